"""One thread answers all questions: those that wait while it works are answered together when it is free."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Generic, TypeVar

from onceover.base.errors import OnceoverError

AT_ONCE = 64  # questions answered together at most
HEAVY_AT_ONCE = 8  # of those that take long
_STOPPING = "the server is stopping; try again when it runs"

Question = TypeVar("Question")
Answer = TypeVar("Answer")
_Entry = tuple[Question, "Future[Answer]"]


class BusyError(OnceoverError):
    """A question that is not answered now: too many wait, or the server is stopping."""


class Batcher(Generic[Question, Answer]):
    """Answers questions in a thread of its own, which alone uses the models.

    A lone question is answered at once. Questions that come meanwhile wait for it to be answered, and are the next
    batch. So batches are as large as the load makes them, and nobody waits for a batch to fill. Questions that take
    long wait apart: where both kinds wait, batches of the two take turns.

    Args:
        answer: gives the answers to a list of questions, in their order.
        is_heavy: whether a question takes long.
        at_once: questions answered together at most.
        waiting: questions that may wait.
    """

    def __init__(
        self,
        answer: Callable[[list[Question]], list[Answer]],
        is_heavy: Callable[[Question], bool] = lambda question: False,
        at_once: int = AT_ONCE,
        waiting: int = 1024,
    ):
        self._answer = answer
        self._is_heavy = is_heavy
        self._sizes = (at_once, min(at_once, HEAVY_AT_ONCE))
        self._most = waiting
        self._queues: tuple[deque[_Entry], deque[_Entry]] = (deque(), deque())  # light ones, heavy ones
        self._turn = 0
        self._is_open = True
        self._changed = threading.Condition()
        self._running: list[_Entry] = []
        self._thread = threading.Thread(target=self._work, name="onceover-models", daemon=True)
        self._thread.start()

    def ask(self, question: Question) -> "Future[Answer]":
        """Gives a future that will hold the answer, or the error that the question led to.

        Raises:
            BusyError: too many questions wait, or the thread was ended.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if not self._is_open:
                raise BusyError(_STOPPING)
            if self.waiting() >= self._most:
                raise BusyError("too many queries wait for an answer; try again in a moment")
            self._queues[self._is_heavy(question)].append((question, future))
            self._changed.notify()
        return future

    def waiting(self) -> int:
        """How many questions wait."""
        return sum(map(len, self._queues))

    def stop(self) -> None:
        """Takes no further questions, and refuses those that have no answer yet; waits for nothing."""
        with self._changed:
            self._is_open = False
            unanswered = [*self._running, *self._queues[0], *self._queues[1]]
            for entries in self._queues:
                entries.clear()
            self._changed.notify()
        for _, future in unanswered:
            with contextlib.suppress(InvalidStateError):  # it was answered, or given up, in this moment
                future.set_exception(BusyError(_STOPPING))

    def close(self, timeout: float | None = None) -> bool:
        """Stops, and waits for the thread to end; whether it did within ``timeout`` seconds."""
        self.stop()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next():
            self._answer_all(batch)

    def _next(self) -> list[_Entry]:
        """The next batch, when there is one; empty when the thread is to end."""
        with self._changed:
            while True:
                self._running = []
                self._changed.wait_for(lambda: not self._is_open or self.waiting())
                if not self._is_open:
                    return []
                self._turn = 1 - self._turn
                if not self._queues[self._turn]:
                    self._turn = 1 - self._turn
                entries = self._queues[self._turn]
                batch = [entries.popleft() for _ in range(min(len(entries), self._sizes[self._turn]))]
                self._running = [entry for entry in batch if entry[1].set_running_or_notify_cancel()]
                if self._running:
                    return self._running

    def _answer_all(self, batch: list[_Entry]) -> None:
        """Answers questions together; where that fails each half by itself, so that only those at fault fail."""
        if not self._is_open:
            return
        try:
            answers = self._answer([question for question, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                self._answer_all(batch[:middle])
                self._answer_all(batch[middle:])
                return
            with contextlib.suppress(InvalidStateError):  # refused by ``stop`` meanwhile
                batch[0][1].set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            with contextlib.suppress(InvalidStateError):
                future.set_result(answer)
