"""The summary of an extraction: counts, speed, the ledger; as plain values and as lines for the user."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from onceover.base.progress import say, warn
from onceover.extract.ledger import Failure
from onceover.extract.store import FeatureStore
from onceover.extract.unknown import UnknownTokens, unknown_of

_SHOWN = 3  # images that lie in several splits


class Speed(NamedTuple):
    """Rows encoded, the seconds that it took, and the seconds of each stage; tokenising is part of encoding."""

    rows: int
    seconds: float
    stages: dict[str, float]

    def __str__(self) -> str:
        return f"{self.rows / self.seconds:.1f} rows a second ({shares(self.stages)})"


def shares(stages: Mapping[str, float]) -> str:
    """The shares of the time, the largest first, since that is the limit: ``encode 93 %, decode 6 %, write 1 %``."""
    whole = sum(stages.values())
    names = sorted(stages, key=lambda name: stages[name], reverse=True)
    return ", ".join(f"{name} {100 * stages[name] / whole:.0f} %" for name in names)


@dataclass
class Summary:
    """The outcome of an extraction.

    Attributes:
        path: of the store.
        up_to_date: whether nothing was to be done.
        images, captions: how many the store has. truncated: captions that were cut.
        unknown: tokens that the text encoder's vocabulary lacks; None where they were not counted.
        failures: the ledger. duplicates: ids of images with one content in several splits.
        computed, reused: rows by kind. speed: by kind. seconds: of all.
    """

    path: Path
    up_to_date: bool
    images: int
    captions: int
    failures: list[Failure]
    truncated: int
    duplicates: list[tuple[str, ...]]
    unknown: UnknownTokens | None = None
    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    speed: dict[str, Speed] = field(default_factory=dict)
    seconds: float = 0.0

    def tell(self) -> None:
        """Tells the user how many rows, how fast, what was left out and why, and what looks wrong."""
        for line in self._lines():
            say(line)
        for line in self._warnings():
            warn(line)

    def _lines(self) -> Iterator[str]:
        """The lines that say how many rows there are, and how fast they were encoded."""
        rows = f"{self.images:,} images, {self.captions:,} captions"
        if self.computed:
            encoded = ", ".join(f"{count:,} {kind}" for kind, count in self.computed.items())
            reused = ", ".join(f"{count:,} {kind}" for kind, count in self.reused.items())
            rows += f"; rows encoded: {encoded} in {self.seconds:.0f} s; reused: {reused}"
        yield rows
        for kind, speed in self.speed.items():
            yield f"{kind}: {speed}"
        if self.unknown and self.unknown.with_unknown and not self.unknown.warning():
            yield str(self.unknown)

    def _warnings(self) -> Iterator[str]:
        """The lines that say what was cut, unknown or left out, and which images lie in several splits."""
        if self.truncated:
            yield f"{self.truncated:,} captions are longer than the text encoder takes and were cut"
        if self.unknown and self.unknown.warning():
            yield str(self.unknown)
        yield from self._left_out()
        for group in self.duplicates[:_SHOWN]:
            yield f"the same image lies in several splits: {', '.join(group)}"
        if len(self.duplicates) > _SHOWN:
            yield f"{len(self.duplicates) - _SHOWN:,} more images lie in several splits"

    def _left_out(self) -> Iterator[str]:
        """A line for each stage and kind of reason, with the first row that it kept out."""
        alike: dict[tuple[str, str], list[Failure]] = {}
        for failure in self.failures:
            alike.setdefault((failure.stage, failure.reason.partition(":")[0]), []).append(failure)
        for (stage, reason), failures in alike.items():
            yield (
                f"left out: {len(failures):,} at stage {stage}: {reason} (the first: {failures[0].id}); "
                f"list: onceover info {shlex.quote(str(self.path))}"
            )


def summary_of(store: FeatureStore, up_to_date: bool) -> Summary:
    """The summary of a finished store, without what this extraction computed."""
    return Summary(
        path=store.path,
        up_to_date=up_to_date,
        images=len(store.image_features),
        captions=len(store.text_features),
        failures=store.failures,
        truncated=int(store.truncated.sum()),
        duplicates=store.duplicates_across_splits(),
        unknown=unknown_of(store),
    )
