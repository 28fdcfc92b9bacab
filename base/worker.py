"""A worker: one of several processes, on however many machines, that share work by a plan that all of them read.

What belongs to whom follows from the numbers alone, so that workers need not know of each other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from onceover.base.errors import OnceoverError

Unit = TypeVar("Unit")
_FORM = re.compile(r"(\d{1,6})/(\d{1,6})")


class WorkerError(OnceoverError):
    """A worker that cannot be, or whose command does not fit the work that it is to share."""


@dataclass(frozen=True)
class Worker:
    """One of several workers: the second of four is ``2/4``.

    Attributes:
        number: from 1. count: how many there are.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def own(self, units: Sequence[Unit]) -> list[Unit]:
        """Every ``count``-th of some units, from its number on."""
        return list(units[self.number - 1 :: self.count])


def parse_worker(text: str) -> Worker:
    """The worker that a text like ``2/4`` names.

    Raises:
        WorkerError: the text is of another form, or the number is not from 1 to how many there are.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise WorkerError(f"{text!r} is no worker; write I/N, for the second of four workers 2/4")
    worker = Worker(int(match[1]), int(match[2]))
    if not 1 <= worker.number <= worker.count:
        raise WorkerError(f"there is no worker {text}; workers are numbered from 1 to how many there are: 1/4 to 4/4")
    return worker
