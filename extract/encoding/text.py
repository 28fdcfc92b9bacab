"""Frozen text encoders: captions and queries -> features. They are in eval mode, as image encoders are."""

import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from onceover.extract.backends import EAGER, readied
from onceover.extract.encoders import EncoderError, library_of, parse_spec
from onceover.extract.encoding.devices import BatchQueue, pick_device
from onceover.extract.encoding.layers import AUTO, text_layers, text_pooling
from onceover.extract.encoding.library_errors import loading
from onceover.extract.encoding.networks import TextNetwork
from onceover.extract.encoding.recipes import as_stored, hash_tokenizer, hash_weights

#: the token ids of a caption: a list, or int64 (L,)
TokenIds = Sequence[int] | Tensor
T = TypeVar("T", bound=Sized)  # a caption's token ids, of one encoder or of several
_SAMPLE = ["a dog", "two children play with a red ball on the beach"]  # captions that a backend is given


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Attributes:
        recipe: all that changes a feature, as plain values; its digest is the features' fingerprint.
        tokenizer: as its library gave it.
        tokenizer_files: the tokenizer's files by name, enough to encode a query later without the dataset.
        vocabulary: how many ids the network knows; None where it cannot be said.
        model: the network.
        device: where it computes.
        backend: the name of the backend that computes; ``eager`` where the one that was asked for could not.
    """

    def __init__(
        self,
        spec: str,
        *,
        layers: str = "last",
        pooling: str = AUTO,
        max_length: int = 128,
        caption_prefix: str = "",
        query_prefix: str | None = None,
        dtype: str = "float32",
        store_dtype: str = "float32",
        seed: int = 0,
        device: str | None = None,
        captions: Sequence[str] | None = None,
        tokenizer_files: dict[str, bytes] | None = None,
        plain: bool = False,
        backend: str = EAGER,
    ):
        """Loads the encoder.

        Args:
            spec: as ``extract.text_encoder`` in the settings.
            layers: the layers that lie side by side in a feature, as ``extract.text_layers`` in the settings.
            pooling: over tokens, ``mean``, ``cls`` or ``last``; ``auto``: the one that suits the model. Dual encoders,
                and the layer ``last`` of some models, have their own.
            max_length: tokens at which captions are cut.
            caption_prefix, query_prefix: put before each caption and each query; None: the same as before captions.
            dtype: of the arithmetic. store_dtype: of the features.
            seed: of random weights.
            device: as ``pick_device``.
            captions: those of the dataset, which give a ``@random`` encoder its vocabulary.
            tokenizer_files: the tokenizer's files, instead of the model's own tokenizer or one made of ``captions``.
            plain: computes in float32 by the backend ``plain``, whatever ``dtype`` and ``backend`` say.
            backend: the name of a backend.
        """
        self._spec = parse_spec(spec)
        self._library = library_of(self._spec)
        self.device = pick_device(device)
        compute_dtype = getattr(torch, dtype)
        if plain:
            backend = "plain"
            compute_dtype = torch.float32
        with loading(self._spec):
            loaded = self._library.load_text(self._spec, seed, captions, tokenizer_files)
        self.tokenizer = loaded.tokenizer
        self.tokenizer_files = loaded.tokenizer.files
        self.vocabulary = loaded.vocabulary
        self._tokenizer_lock = threading.Lock()  # tokenizers change while they work
        self._prefixes = {"caption_prefix": caption_prefix}
        if query_prefix is not None and query_prefix != caption_prefix:
            self._prefixes["query_prefix"] = query_prefix
        self._max_length = min(max_length, loaded.max_length)
        self._takes_full_length = loaded.takes_full_length
        layer_names = text_layers(layers, loaded)
        self._network = TextNetwork(loaded, layer_names, text_pooling(pooling, loaded, layer_names))
        self.model = loaded.module.eval().requires_grad_(False)
        self.recipe = as_stored(
            loaded.recipe
            | {
                "weights": hash_weights(self.model),
                "tokenizer": hash_tokenizer(self.tokenizer_files),
                "layers": self._network.layers,
                "pooling": self._network.pooling,
                "max_length": self._max_length,
                "dtype": dtype,
                "store_dtype": store_dtype,
            }
            | {name: prefix for name, prefix in self._prefixes.items() if prefix or name == "query_prefix"}
        )
        self._store_dtype = getattr(torch, store_dtype)
        sample = self._padded(self.tokenize(_SAMPLE)[0])
        with loading(self._spec):
            self.backend, self._compute = readied(
                backend, lambda chosen: chosen.text(self._network, sample, self.device, compute_dtype)
            )
        self._queue = BatchQueue(self.device)

    def encode(
        self, captions: Sequence[str], batch_size: int = 64, *, are_queries: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of M captions, or queries, (M, D) as stored, in their order, and which were cut, bool (M,)."""
        token_ids, truncated = self.tokenize(captions, are_queries=are_queries)
        return encode_by_length(self.encode_tokens, token_ids, batch_size), truncated

    def tokenize(self, captions: Sequence[str], *, are_queries: bool = False) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of M captions, and which were cut at the maximum length, bool (M,). Called from any thread.

        Args:
            are_queries: put the prefix of queries before them, where it is another one than that of captions.

        Raises:
            EncoderError: a caption that is no text.
        """
        for number, caption in enumerate(captions, 1):
            if caption.encode("utf-8", "ignore").decode() != caption:
                raise EncoderError(f"text {number:,} of {len(captions):,} holds half a character; write it as UTF-8")
        prefix = self._prefixes["caption_prefix"]
        if are_queries:
            prefix = self._prefixes.get("query_prefix", prefix)
        with self._tokenizer_lock:
            return self._tokenized([f"{prefix or ''}{caption}" for caption in captions])

    def _tokenized(self, captions: list[str]) -> tuple[list[list[int]], np.ndarray]:
        """As ``tokenize``, of captions that are text; one call at a time."""
        token_ids = self.tokenizer.token_ids(captions, self._max_length)
        truncated = np.array([len(ids) == self._max_length for ids in token_ids], dtype=bool)
        full = np.flatnonzero(truncated)
        if len(full):
            whole = self.tokenizer.token_ids([captions[row] for row in full], None)
            truncated[full] = [len(ids) > self._max_length for ids in whole]
        return token_ids, truncated

    def unknown_tokens(self, token_ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Counts, of each of M captions, the tokens that the vocabulary lacks, and all its tokens: int32 (M,) each.

        The ids that stand around a caption are not counted.
        """
        unknown_id: Any = getattr(self.tokenizer, "unknown_id", None)
        frame = self.tokenizer.frame_ids
        unknown = [ids.count(unknown_id) for ids in token_ids]
        tokens = [len(ids) - sum(map(ids.count, frame)) for ids in token_ids]
        return np.array(unknown, np.int32), np.array(tokens, np.int32)

    def encode_tokens(self, token_ids: list[list[int]]) -> np.ndarray:
        """Features of a batch of B captions, padded to the longest: (B, D) as stored. From several threads at will."""
        return self.begin(token_ids)()

    @torch.inference_mode()
    def begin(self, token_ids: list[list[int]]) -> Callable[[], np.ndarray]:
        """Begins to encode; the call that is returned waits for what ``encode_tokens`` gives."""
        inputs = self._padded(token_ids)
        stored = partial(self._features, list(inputs), self._store_dtype)
        return self._queue.begin(stored, *inputs.values())

    @torch.inference_mode()
    def computed(self, token_ids: list[list[int]]) -> np.ndarray:
        """Features of a batch of B captions before they are rounded to the storage dtype: float32 (B, D)."""
        inputs = self._padded(token_ids)
        return self._queue.begin(partial(self._features, list(inputs), torch.float32), *inputs.values())()

    def _features(self, names: list[str], dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        """Features in a dtype, of inputs that lie on the device, in the order of their names."""
        return self._compute(dict(zip(names, tensors, strict=True))).to(dtype)

    def padded(self, token_ids: Sequence[TokenIds]) -> dict[str, Tensor]:
        """A batch on the device as the model takes it: ``input_ids`` (B, L) and, but for SigLIP, ``attention_mask``."""
        return {name: tensor.to(self.device) for name, tensor in self._padded(token_ids).items()}

    def _padded(self, token_ids: Sequence[TokenIds]) -> dict[str, Tensor]:
        """As ``padded``, on the processor."""
        lengths = np.array([len(row) for row in token_ids])
        width = lengths.max()
        if self._takes_full_length:
            width = self._max_length
        mask = np.arange(width) < lengths[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad_id, dtype=np.int64)
        ids[mask] = np.concatenate(token_ids)
        inputs = {"input_ids": torch.from_numpy(ids)}
        if not self._takes_full_length:
            inputs["attention_mask"] = torch.from_numpy(mask).long()
        return inputs

    def outputs(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """A pass over a padded batch: float32 (B, D) of each of the recipe's layers; gradients flow."""
        return self._network.outputs(inputs)

    def save(self, folder: Path) -> str:
        """Writes the weights as safetensors, and the tokenizer; returns their spec."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.tokenizer_files.items():
            (folder / name).write_bytes(data)
        return self._library.save(self._spec, "text", self.model, folder)


def by_length(token_ids: Sequence[T], size: int) -> Iterator[tuple[np.ndarray, list[T]]]:
    """Batches of captions of similar length, so that little is padded: their rows, int64 (B,), and their token ids."""
    order = np.argsort([len(ids) for ids in token_ids], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, [token_ids[row] for row in rows]


def encode_by_length(
    encode: Callable[[list[T]], np.ndarray], token_ids: Sequence[T], batch_size: int = 64
) -> np.ndarray:
    """Features of M captions, (M, D), in their order, from batches of similar length. ``encode``: of a batch."""
    batches = list(by_length(token_ids, batch_size))
    features = np.concatenate([encode(ids) for _, ids in batches])
    return features[np.argsort(np.concatenate([rows for rows, _ in batches]))]
