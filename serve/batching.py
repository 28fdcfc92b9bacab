"""One thread answers all questions: those that wait while it works are answered together when it is free."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from onceover.base.errors import OnceoverError

AT_ONCE = 64  # questions answered together at most

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class BusyError(OnceoverError):
    """More questions wait than there is room for."""


class Batcher(Generic[Question, Answer]):
    """Answers questions in a thread of its own, which alone uses the models.

    A lone question is answered at once. Questions that come meanwhile wait for it to be answered, and are the next
    batch. So batches are as large as the load makes them, and nobody waits for a batch to fill.

    Args:
        answer: gives the answers to a list of questions, in their order.
        at_once: questions answered together at most.
        waiting: questions that may wait.
    """

    def __init__(self, answer: Callable[[list[Question]], list[Answer]], at_once: int = AT_ONCE, waiting: int = 1024):
        self._answer = answer
        self._at_once = at_once
        self._queue: queue.Queue[tuple[Question, Future[Answer]] | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="onceover-models", daemon=True)
        self._thread.start()

    def ask(self, question: Question) -> "Future[Answer]":
        """Gives a future that will hold the answer, or the error that the question led to.

        Raises:
            BusyError: too many questions wait.
        """
        future: Future[Answer] = Future()
        try:
            self._queue.put_nowait((question, future))
        except queue.Full as error:
            raise BusyError("too many queries wait for an answer; try again in a moment") from error
        return future

    def waiting(self) -> int:
        """How many questions wait."""
        return self._queue.qsize()

    def close(self) -> None:
        """Ends the thread when all that waits is answered."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        is_open = True
        while is_open:
            batch = []
            entry = self._queue.get()
            while entry is not None:
                batch.append(entry)
                if len(batch) == self._at_once or self._queue.empty():
                    break
                entry = self._queue.get()
            is_open = entry is not None
            self._answer_all([entry for entry in batch if entry[1].set_running_or_notify_cancel()])

    def _answer_all(self, batch: list[tuple[Question, "Future[Answer]"]]) -> None:
        """Answers questions together; where that fails each by itself, so that only the one at fault fails."""
        if not batch:
            return
        try:
            answers = self._answer([question for question, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for entry in batch:
                self._answer_all([entry])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)
