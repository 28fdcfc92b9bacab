"""The contrastive loss of image-text retrieval."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(images: Tensor, texts: Tensor, image_of_text: Tensor, temperature: Tensor | float) -> Tensor:
    """Symmetric cross-entropy over in-batch similarities; captions of one picture are never each other's negatives.

    With s = images @ texts.T / temperature, caption t and its picture i give
    ``-log(exp s_it / (exp s_it + sum of exp s_iu over captions u of other pictures))`` (picture to text) and
    ``-log(exp s_it / sum of exp s_jt over pictures j)`` (text to picture); the result is the mean over captions of
    the two's mean. With one caption a picture it is the loss of CLIP (Radford et al. 2021), as in ConVIRT
    (Zhang et al. 2020).

    Args:
        images: unit vectors (B, D), each picture once.
        texts: unit vectors (T, D).
        image_of_text: int64 (T,), the row in ``images`` of each caption's picture.
        temperature: scalar divisor of the similarities.
    """
    logits = texts @ images.T / temperature  # (T, B)
    text_to_image = F.cross_entropy(logits, image_of_text)
    own = F.one_hot(image_of_text, len(images)).bool()
    positive = logits[own]
    # over captions of other pictures, for each picture; -inf where a batch has none
    others = logits.masked_fill(own, -torch.inf).logsumexp(0)
    image_to_text = (torch.logaddexp(positive, others[image_of_text]) - positive).mean()
    return (image_to_text + text_to_image) / 2
