"""Finds rows by text, such as their captions, in little memory however many they are."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Literal

import numpy as np

from onceover.base.temporary import IN_MEMORY, TemporaryBytes, temporary_rows
from onceover.base.texts import ChosenTexts, TextColumn, text_column

_DIGEST = np.dtype("S16")
_BLOCK = 4096  # keys that are looked up at a time


class KeyIndex:
    """Finds the numbers that were added with a key, in threads and forks of the process, once all are added.

    It holds digests of 16 bytes, in ascending order, and not the keys themselves; where they are many, in files that
    are mapped.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new_digests = TemporaryBytes(IN_MEMORY)
        self._new_numbers = TemporaryBytes(IN_MEMORY)
        self._digests = np.zeros(0, _DIGEST)
        self._numbers = np.zeros(0, np.int64)

    def __bool__(self) -> bool:
        return bool(self._new_digests.size)

    def add(self, keys: Iterable[str], numbers: np.ndarray) -> None:
        """Adds keys, each with a number: int64 (n,). A key may be added again, with another number.

        Raises:
            TemporaryFileError: there is no room for them.
        """
        for digests in _digests(keys):
            self._new_digests.add(digests)
        self._new_numbers.add(np.ascontiguousarray(numbers, np.int64))

    def first(self, keys: Iterable[str]) -> np.ndarray:
        """The number that was added first with each of some keys, int64 (n,); −1 for a key that was not added."""
        return self._find(keys, "left")

    def last(self, keys: Iterable[str]) -> np.ndarray:
        """The number that was added last with each of some keys, int64 (n,); −1 for a key that was not added."""
        return self._find(keys, "right")

    def firsts(self) -> np.ndarray:
        """The number that was added first with each different key, int64 (n,), ascending."""
        self._sort()
        is_first = np.ones(len(self._digests), bool)
        is_first[1:] = self._digests[1:] != self._digests[:-1]
        return np.sort(self._numbers[is_first])

    def _find(self, keys: Iterable[str], side: Literal["left", "right"]) -> np.ndarray:
        """The number of the first or the last of the equal digests of each key, or −1."""
        self._sort()
        found = [np.zeros(0, np.int64)]
        for digests in _digests(keys):
            numbers = np.full(len(digests), -1, np.int64)
            if len(self._digests):
                places = np.searchsorted(self._digests, digests, side)
                if side == "right":
                    places -= 1
                places = places.clip(0, len(self._digests) - 1)
                is_there = self._digests[places] == digests
                numbers[is_there] = self._numbers[places[is_there]]
            found.append(numbers)
        return np.concatenate(found)

    def _sort(self) -> None:
        """Puts what was added into order, unless it is; of equal keys the earlier one comes first.

        Raises:
            TemporaryFileError: there is no room for it.
        """
        with self._lock:
            if len(self._digests) * _DIGEST.itemsize == self._new_digests.size:
                return
            digests = self._new_digests.array(_DIGEST)
            order = np.argsort(digests, kind="stable")
            numbers = self._new_numbers.array(np.int64)
            self._numbers = temporary_rows(numbers, order, np.int64, IN_MEMORY)
            self._digests = temporary_rows(digests, order, _DIGEST, IN_MEMORY)


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


def _digests(keys: Iterable[str]) -> Iterator[np.ndarray]:
    """A digest of each key, some keys at a time; those of different keys are different."""
    waiting = iter(keys)
    while block := list(islice(waiting, _BLOCK)):
        digests = bytearray()
        for key in block:
            digests += blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST.itemsize).digest()
        yield np.frombuffer(digests, _DIGEST)
