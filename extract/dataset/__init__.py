"""A dataset: images with stable keys, their splits, and captions with the map from caption to image."""

import time
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.texts import text_column
from onceover.extract.address_images import image_folder
from onceover.extract.dataset.reading import DEFAULT, ReadOptions
from onceover.extract.image_source import ImageSource
from onceover.extract.ledger import Failure


class DatasetError(OnceoverError):
    """A dataset that cannot be read, or that would give wrong results."""


@dataclass(frozen=True)
class Dataset:
    """N images with M captions, in the order of the captions file.

    Attributes:
        root: the folder that the dataset lies in.
        layout: the name of its layout.
        ids: the images' names. paths: their keys in ``images``; in a folder of files, paths relative to ``root``.
        splits: train, dev, test or "", by image. These and the captions are kept in little memory (``base.texts``).
        image_index: the image of each caption, int64 (M,).
        failures: each row that was left out. notes: what the user should be told.
        source: where the images' bytes come from; None stands for the files below ``root``.
        taken: how it was read: "CSV, images from `image`, captions from `caption`: 300 rows".
        named: the path that the user gave, where it is known. reading: the options that the user gave.
    """

    root: Path
    layout: str
    ids: Sequence[str]
    paths: Sequence[str]
    splits: Sequence[str]
    captions: Sequence[str]
    image_index: np.ndarray
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: ImageSource | None = None
    taken: str = ""
    named: Path | None = None
    reading: ReadOptions = DEFAULT

    def __post_init__(self) -> None:
        """Takes columns of text over as ``base.texts`` keeps them."""
        for name in ("ids", "paths", "splits", "captions"):
            object.__setattr__(self, name, text_column(getattr(self, name)))

    @property
    def images(self) -> ImageSource:
        """Where the images' bytes come from."""
        return image_folder(self.root) if self.source is None else self.source

    def paths_of(self, ids: Set[str]) -> dict[str, str]:
        """The paths of those images that have one of some ids, by their ids."""
        if not ids:
            return {}
        return {name: path for name, path in zip(self.ids, self.paths, strict=True) if name in ids}

    def provenance(self) -> dict:
        """The part of a store's provenance that describes its dataset, with the time of writing."""
        return {
            "data": str(self.root.resolve()),
            "named": str((self.named or self.root).absolute()),
            "layout": self.layout,
            "reading": self.reading.given(),
            "notes": self.notes,
            "splits": dict(Counter(self.splits)),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def first(self, limit: int | None) -> "Dataset":
        """The first ``limit`` images and their captions."""
        if limit is None or limit >= len(self.ids):
            return self
        rows = np.flatnonzero(self.image_index < limit)
        return replace(
            self,
            ids=self.ids[:limit],
            paths=self.paths[:limit],
            splits=self.splits[:limit],
            captions=[self.captions[row] for row in rows.tolist()],
            image_index=self.image_index[rows],
            notes=[*self.notes, f"limited to the first {limit:,} of {len(self.ids):,} images"],
        )
