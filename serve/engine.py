"""What the search page answers with: the models and galleries, opened once, and queries answered in batches."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from onceover.base.errors import OnceoverError
from onceover.base.progress import warn
from onceover.heads.searching import Collection
from onceover.retrieval.gallery import NOUNS
from onceover.retrieval.search import Hit, Query, Searcher, SearchError, Term, at_least
from onceover.serve.batching import AT_ONCE, Batcher
from onceover.serve.limits import MAX_WAITING, MIN_WEIGHT
from onceover.serve.paired import Paired
from onceover.serve.vectors import Upload, Vectors

_WARM_UP = "a dog playing in the park"


@dataclass(frozen=True)
class Question:
    """A query, and how many hits it is to have, of which gallery and with which least score."""

    query: Query
    kind: str
    top_k: int
    min_score: float | None

    @property
    def has_images(self) -> bool:
        """Whether an image is to be embedded for it."""
        return any(term.image is not None for term in self.query.terms)

    @property
    def settings(self) -> tuple[str, int]:
        """What questions must have in common to be searched for together."""
        return self.kind, self.top_k


@dataclass(frozen=True)
class Answer:
    """The hits of a question, the score of the best item, which may be too low to be a hit, and what was left out.

    Attributes:
        note: what the text encoder left out of the question; None where it took all of it.
    """

    hits: list[Hit]
    best_score: float | None
    note: str | None


@dataclass
class Engine:
    """Searches the galleries of a run or an index, from one thread that owns the models.

    Attributes:
        collection: what is searched.
        takes: by kind of a query's term, ``text`` or ``image``, why it cannot be embedded; None where it can be.
    """

    collection: Collection
    at_once: int = AT_ONCE
    takes: dict[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        galleries = self.collection.galleries
        self._vectors = Vectors(self.collection.embedder)
        self._searchers: dict[str, Searcher] = {}
        for kind, gallery in galleries.items():
            other = galleries.get("text" if kind == "image" else "image")
            self._searchers[kind] = Searcher(Paired(gallery, other), self._vectors)
        self._batcher: Batcher[Question, Answer] = Batcher(
            self._answer, lambda question: question.has_images, self.at_once, MAX_WAITING
        )
        self.takes = {"text": None, "image": None}

    def warm_up(self) -> None:
        """Loads the models and answers one query; an encoder that cannot be loaded is warned of, and refused later."""
        kind = next(iter(self._searchers))
        terms = {"text": lambda: Term(text=_WARM_UP), "image": lambda: Term(image=self.upload(_blank_image()))}
        for name, make in terms.items():
            try:
                self.ask(Question(Query((make(),)), kind, 1, None)).result()
            except OnceoverError as error:
                self.takes[name] = str(error)
                warn(f"queries by {name} are refused: {error}")

    def upload(self, data: bytes) -> Upload:
        """An image file that is to be searched by, decoded and made as small as the image encoder takes it.

        Raises:
            SearchError: images cannot be embedded here. PictureError: no usable image. MemoryError: no room for it now.
        """
        self._check_taken("image")
        upload = Upload(data)
        upload.pixels = self.collection.embedder.pixels(data)
        return upload

    def ask(self, question: Question) -> "Future[Answer]":
        """Gives a future that will hold the hits.

        Raises:
            SearchError: a query that cannot be embedded, or a gallery that is not there. BusyError: too many wait.
        """
        if question.kind not in self._searchers:
            raise SearchError(f"there are no {NOUNS[question.kind]} here to search; search the other gallery")
        if max(abs(term.weight) for term in question.query.terms) < MIN_WEIGHT:
            raise SearchError("all terms of the query have the weight 0, or nearly 0; raise one")
        for term in question.query.terms:
            self._check_taken(term.source[0])
        return self._batcher.ask(question)

    def stop(self) -> None:
        """Refuses what is not answered yet, and all that follows."""
        self._batcher.stop()

    def close(self, timeout: float | None = None) -> bool:
        """Ends the thread; whether it ended within ``timeout`` seconds."""
        return self._batcher.close(timeout)

    def _check_taken(self, kind: str) -> None:
        reason = self.takes.get(kind)
        if reason is not None:
            raise SearchError(f"queries by {kind} cannot be embedded here: {reason}")

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The hits of each question; those of the same settings are searched for together."""
        alike: dict[tuple[str, int], list[int]] = {}
        for number, question in enumerate(questions):
            alike.setdefault(question.settings, []).append(number)
        answers: dict[int, Answer] = {}
        for (kind, top_k), numbers in alike.items():
            results = self._searchers[kind].search_many([questions[number].query for number in numbers], top_k)
            for number, hits in zip(numbers, results, strict=True):
                answers[number] = self._answer_of(questions[number], hits)
        return [answers[number] for number in range(len(questions))]

    def _answer_of(self, question: Question, hits: list[Hit]) -> Answer:
        best = hits[0].score if hits else None
        texts = [term.text for term in question.query.terms if term.text is not None]
        note = "; ".join(filter(None, map(self._vectors.note, texts)))
        return Answer(hits if question.min_score is None else at_least(hits, question.min_score), best, note or None)


def _blank_image() -> bytes:
    """A white image as PNG."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, "PNG")
    return buffer.getvalue()
