"""Finds rows by text, such as their captions, in little memory however many they are."""

import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np

from onceover.base.temporary import temporary_files
from onceover.base.texts import ChosenTexts, TextColumn, text_column

_DIGEST_SIZE = 16  # bytes
_CACHE = 4096  # KiB of the table that stay in memory


class KeyIndex:
    """Finds the numbers that were added with a key; from several threads at will, once all are added.

    It is a table of SQLite, in memory while it is small and else in a temporary file, which SQLite removes. The table
    holds digests of the keys, and not the keys themselves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table = sqlite3.connect("", check_same_thread=False)
        weakref.finalize(self, self._table.close)
        self._table.execute(f"PRAGMA cache_size = {-_CACHE}")
        self._table.execute("PRAGMA journal_mode = OFF")  # a table that is lost with the process needs none
        self._table.execute("CREATE TABLE added (digest BLOB, number INTEGER)")

    def add(self, keys: Iterable[str], numbers: np.ndarray) -> None:
        """Adds keys, each with a number: int64 (n,). A key may be added again, with another number.

        Raises:
            TemporaryFileError: there is no room for the table.
        """
        rows = zip(_digests(keys), map(int, numbers), strict=True)
        with self._lock, temporary_files(), self._table:
            self._table.executemany("INSERT INTO added VALUES (?, ?)", rows)

    def first(self, keys: Iterable[str]) -> np.ndarray:
        """The smallest number that was added with each of some keys, int64 (n,); −1 for a key that was not added."""
        return self._find("SELECT min(number) FROM added WHERE digest = ?", keys)

    def last(self, keys: Iterable[str]) -> np.ndarray:
        """The largest number that was added with each of some keys, int64 (n,); −1 for a key that was not added."""
        return self._find("SELECT max(number) FROM added WHERE digest = ?", keys)

    def firsts(self) -> np.ndarray:
        """The smallest number that was added with each different key, int64 (n,), ascending."""
        with self._lock, temporary_files():
            self._sort()
            found = self._table.execute("SELECT min(number) AS first FROM added GROUP BY digest ORDER BY first")
            return np.fromiter((number for (number,) in found), np.int64)

    def _find(self, query: str, keys: Iterable[str]) -> np.ndarray:
        """The number that a query finds for the digest of each key, or −1."""
        with self._lock, temporary_files():
            self._sort()
            found = (self._table.execute(query, (digest,)).fetchone() for digest in _digests(keys))
            return np.fromiter((-1 if number is None else number for (number,) in found), np.int64)

    def _sort(self) -> None:
        """Makes what finds rows by their digests, unless it is there."""
        self._table.execute("CREATE INDEX IF NOT EXISTS by_digest ON added (digest, number)")


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


def _digests(keys: Iterable[str]) -> Iterator[bytes]:
    """A digest of each key; those of different keys are different."""
    for key in keys:
        yield blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_SIZE).digest()
