"""Unknown tokens: how much of some captions a text encoder's vocabulary lacks, and what to do about it.

A tokenizer replaces what its vocabulary lacks by one token that means nothing: emoji, or a language that the encoder
never saw. Captions of such tokens alone all have the same features. numpy only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onceover.extract.store import NOT_COUNTED, FeatureStore

MANY_TOKENS = 0.05  # the share of all tokens from which unknown ones are warned of
MUCH_OF_A_CAPTION = 1 / 3  # the share of a caption's tokens; some tokenizers replace a run of characters by one token
MANY_CAPTIONS = 0.01  # the share of captions with as much unknown, from which they are warned of
_SHOWN = 60  # characters of the example


class UnknownTokens(NamedTuple):
    """Unknown tokens among some captions.

    Attributes:
        captions: how many were counted. not_counted: how many were not, since an earlier version encoded them.
        with_unknown: captions with unknown tokens. mostly: captions with ``MUCH_OF_A_CAPTION`` unknown.
        tokens: in all. unknown: how many of them are unknown.
        example: a caption with the largest share of unknown tokens; "" where there is none.
    """

    captions: int
    not_counted: int
    with_unknown: int
    mostly: int
    tokens: int
    unknown: int
    example: str

    def __str__(self) -> str:
        text = (
            f"captions with unknown tokens: {self.with_unknown:,} of {self.captions:,} "
            f"({_percent(self.with_unknown, self.captions)}); unknown tokens: {_percent(self.unknown, self.tokens)}"
        )
        if self.not_counted:
            encoded = "caption was encoded" if self.not_counted == 1 else "captions were encoded"
            text += f"; {self.not_counted:,} {encoded} by an earlier version, which did not count"
        return text

    def warning(self) -> str | None:
        """The warning that the encoder is the wrong one for these captions, with the remedy; None where it is not."""
        is_much = self.unknown >= MANY_TOKENS * max(1, self.tokens)
        if not is_much and self.mostly < MANY_CAPTIONS * max(1, self.captions):
            return None
        return (
            f"the text encoder's vocabulary lacks much of the captions ({_percent(self.unknown, self.tokens)} of their "
            f"tokens), as of {self.example[:_SHOWN]!r}; take one for their language, or a multilingual one such as "
            "hf:distilbert-base-multilingual-cased"
        )


def count_unknown(captions: Sequence[str], unknown: np.ndarray, tokens: np.ndarray) -> UnknownTokens:
    """Adds up the unknown tokens of captions: ``unknown`` and ``tokens``, int (M,), as the columns of a store."""
    is_counted = unknown != NOT_COUNTED
    shares = np.where(is_counted, unknown / np.maximum(tokens, 1), 0)
    example = ""
    if shares.any():
        example = captions[int(shares.argmax())]
    return UnknownTokens(
        captions=int(is_counted.sum()),
        not_counted=int((~is_counted).sum()),
        with_unknown=int((unknown > 0).sum()),
        mostly=int((shares >= MUCH_OF_A_CAPTION).sum()),
        tokens=int(tokens[is_counted].sum()),
        unknown=int(unknown[is_counted].sum()),
        example=example,
    )


def unknown_of(store: FeatureStore) -> UnknownTokens | None:
    """The unknown tokens of a store's captions; None where they were not counted."""
    if store.unknown is None or store.tokens is None or (store.unknown == NOT_COUNTED).all():
        return None
    return count_unknown(store.captions, store.unknown, store.tokens)


def _percent(part: int, whole: int) -> str:
    """A share in percent: ``24 %``."""
    if 0 < 100 * part < whole:
        return "under 1 %"
    return f"{100 * part / max(1, whole):.0f} %"
