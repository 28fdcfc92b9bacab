"""A tokenizer whose vocabulary is a dataset's own."""

from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def dataset_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer whose vocabulary is the captions' characters and words, most frequent words first.

    Every word of the captions is one token; an unseen word falls apart into characters.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    characters = sorted(set().union(*counts))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    entries = [*_SPECIAL_TOKENS.values(), *characters, *(f"##{character}" for character in characters), *words]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **_SPECIAL_TOKENS)
