"""Finds rows by text, such as their captions, with 24 bytes of memory a row; a dict of strings takes some 200."""

import threading
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np

from onceover.base.texts import ChosenTexts, TextColumn, text_column

_DIGEST = np.dtype("S16")
_BLOCK = 4096  # keys that are looked up at a time


class KeyIndex:
    """Finds the numbers that were added with a key; from several threads at will, once all are added.

    It holds digests of 16 bytes, in ascending order, and not the keys themselves.
    """

    def __init__(self) -> None:
        self._digests = np.zeros(0, _DIGEST)
        self._numbers = np.zeros(0, np.int64)
        self._new_digests = bytearray()
        self._new_numbers: array[int] = array("q")
        self._lock = threading.Lock()

    def add(self, keys: Iterable[str], numbers: np.ndarray) -> None:
        """Adds keys, each with a number: int64 (n,). A key may be added again, with another number."""
        self._new_digests += _digests(keys)
        self._new_numbers.frombytes(numbers.astype(np.int64).tobytes())

    def first(self, keys: Sequence[str]) -> np.ndarray:
        """The number that was added first with each of some keys, int64 (n,); −1 for a key that was not added."""
        return self._find(keys, "left")

    def last(self, keys: Sequence[str]) -> np.ndarray:
        """The number that was added last with each of some keys, int64 (n,); −1 for a key that was not added."""
        return self._find(keys, "right")

    def firsts(self) -> np.ndarray:
        """The number that was added first with each different key, int64 (n,), ascending."""
        self._sort()
        is_first = np.ones(len(self._digests), bool)
        is_first[1:] = self._digests[1:] != self._digests[:-1]
        return np.sort(self._numbers[is_first])

    def _find(self, keys: Sequence[str], side: Literal["left", "right"]) -> np.ndarray:
        """The number of the first or the last of the equal digests of each key, or −1."""
        self._sort()
        numbers = np.full(len(keys), -1, np.int64)
        if not len(self._digests):
            return numbers
        for start in range(0, len(keys), _BLOCK):
            digests = np.frombuffer(_digests(keys[start : start + _BLOCK]), _DIGEST)
            places = np.searchsorted(self._digests, digests, side)
            if side == "right":
                places -= 1
            places = places.clip(0, len(self._digests) - 1)
            is_there = self._digests[places] == digests
            numbers[start : start + _BLOCK][is_there] = self._numbers[places[is_there]]
        return numbers

    def _sort(self) -> None:
        """Puts what was added since the last time into order; of equal keys the earlier one comes first."""
        with self._lock:
            if not self._new_digests:
                return
            digests = np.concatenate([self._digests, np.frombuffer(self._new_digests, _DIGEST)])
            self._new_digests = bytearray()
            order = np.argsort(digests, kind="stable")
            self._digests = digests[order]
            del digests
            self._numbers = np.concatenate([self._numbers, np.frombuffer(self._new_numbers, np.int64)])[order]
            self._new_numbers = array("q")


def different_texts(texts: Sequence[str]) -> TextColumn:
    """Each different text of a column once, in the order in which they first come."""
    index = KeyIndex()
    index.add(texts, np.arange(len(texts)))
    return ChosenTexts(text_column(texts), index.firsts())


def repeated_rows(texts: Sequence[str]) -> list[list[int]]:
    """The rows of each text that stands in a column more than once, in the order in which the texts first come."""
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
    order = np.argsort(hashes)
    is_like_next = hashes[order[:-1]] == hashes[order[1:]]
    candidates = np.union1d(order[:-1][is_like_next], order[1:][is_like_next])  # other texts may have equal hashes
    rows_of: dict[str, list[int]] = {}
    for row in candidates.tolist():
        rows_of.setdefault(texts[row], []).append(row)
    return [rows for rows in rows_of.values() if len(rows) > 1]


def _digests(keys: Iterable[str]) -> bytearray:
    """A digest of each key, of 16 bytes: those of different keys are different."""
    digests = bytearray()
    for key in keys:
        digests += blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST.itemsize).digest()
    return digests
