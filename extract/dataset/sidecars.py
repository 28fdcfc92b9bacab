"""A folder in which each image has a text or a JSON of the same name, beside it or in a parallel folder."""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from onceover.base.files import FileError, read_bytes
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.samples import MAX_SIDECAR, TEXT_ALONE, TEXT_SUFFIXES, Sample, sample_rows
from onceover.extract.dataset.shard_files import files_below
from onceover.extract.dataset.splits import named_splits
from onceover.extract.listing import is_image

#: folders that stand for each other: ``images/a.jpg`` and ``captions/a.txt``
_PARALLEL = {
    *("images", "image", "imgs", "img", "photos", "pictures", "jpg", "jpgs"),
    *("captions", "caption", "texts", "text", "txt", "annotations", "descriptions", "prompts"),
}
_PARTS = re.compile(r"[^\s,;:]*\w[^\s,;:]*")  # words and numbers
_FIRST = 20  # texts that are looked at to see whether they hold words


class Sidecars:
    """A folder's images with the texts beside them.

    Attributes:
        samples: those with an image, in the order of the images' names; then those of a JSON without an image.
        alone: texts without an image.
    """

    def __init__(self, folder: Path, options: ReadOptions):
        self._folder = folder
        self._options = options
        texts = files_below(folder, options)
        images = texts if options.images_root is None else files_below(options.images_root, options)
        samples: dict[str, Sample] = {}
        for name in filter(is_image, images):
            samples.setdefault(_stem(name), Sample(_stem(name))).add(name, _suffix(name))
        by_image = {sample.image: sample for sample in samples.values()}
        parallel = _unique(samples.values(), lambda sample: [_parallel_name(sample.name)])
        folders = {name.rpartition("/")[0] for name in by_image}
        self.alone: list[str] = []
        for name in texts:
            stem = _stem(name)
            is_text = _suffix(name) in TEXT_SUFFIXES
            if is_text:
                sample = samples.get(stem) or by_image.get(stem) or parallel.get(_parallel_name(stem))
                if sample is None:
                    self.alone.append(name)
                else:
                    sample.add(name, _suffix(name))
            elif _suffix(name) == ".json" and name.rpartition("/")[0] in folders:
                sample = by_image.get(stem) or by_image.get(_stem(stem))  # a.jpg.json, a.jpg.metadata.json
                (sample or samples.setdefault(stem, Sample(stem))).add(name, ".json")
        self.samples = list(samples.values())
        if not any(sample.text and sample.image for sample in self.samples):
            self._match_by_end()

    def _match_by_end(self) -> None:
        """Gives each text alone the only image whose path ends as its own does, without the suffixes.

        ``text/x/1.txt`` goes with ``pictures/x/1.jpg``, though another image is ``pictures/y/1.jpg``.
        """
        images = _unique([sample for sample in self.samples if sample.image], lambda sample: _ends(sample.name))
        found = {name: _first(images, _ends(_stem(name))) for name in self.alone}
        claims = Counter(sample.name for sample in found.values() if sample is not None)
        for name, sample in found.items():
            if sample is not None and claims[sample.name] == 1:
                sample.add(name, _suffix(name))
        self.alone = [name for name, sample in found.items() if sample is None or sample.text != name]

    def first_text(self) -> str:
        """The first text that has an image, or the first JSON that has one and holds a caption; "" where none does."""
        texts = self._texts()
        if texts:
            return texts[0]
        for sample in [sample for sample in self.samples if sample.image and sample.json][:_FIRST]:
            if any(row.caption for row in sample_rows(sample, self._read, self._options)):
                return sample.json
        return ""

    def _texts(self) -> list[str]:
        """The texts that have an image."""
        return [sample.text for sample in self.samples if sample.image and sample.text]

    def has_words(self) -> bool:
        """Whether one of the first texts is of words; labels of boxes are numbers, with the name of a class at most."""
        texts = self._texts()
        if not texts:
            return True  # of a JSON only a caption is taken
        for name in texts[:_FIRST]:
            try:
                content = self._read(name).decode("utf-8", "replace")
            except DatasetError:
                return True  # told when it is read again
            parts = _PARTS.findall(content)
            if 2 * sum(any(letter.isalpha() for letter in part) for part in parts) >= len(parts) > 0:
                return True
        return False

    def rows(self) -> Iterator[Row]:
        """The captions of all images, and a row with its fault for each text without an image."""
        splits = named_splits([sample.name.rpartition("/")[0] for sample in self.samples])
        for sample, split in zip(self.samples, splits, strict=True):
            yield from sample_rows(sample, self._read, self._options, split)
        for name in self.alone:
            yield Row(name, "", "", TEXT_ALONE)

    def _read(self, name: str) -> bytes:
        """The content of a text.

        Raises:
            DatasetError: it cannot be read.
        """
        try:
            return read_bytes(self._folder / name, MAX_SIDECAR)
        except (OSError, FileError) as error:
            raise DatasetError(f"its text cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _stem(name: str) -> str:
    """A file's name without its suffix."""
    return posixpath.splitext(name)[0]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _parallel_name(stem: str) -> str:
    """A name without its first folder of ``_PARALLEL``, which is called otherwise for texts than for images."""
    parts = stem.split("/")
    for number, part in enumerate(parts[:-1]):
        if part.lower() in _PARALLEL:
            return "/".join(parts[:number] + parts[number + 1 :])
    return stem


def _ends(stem: str) -> list[str]:
    """The ends of a path, the longest first, without the path itself: ``b/c`` and ``c`` of ``a/b/c``."""
    parts = stem.split("/")
    return ["/".join(parts[start:]) for start in range(1, len(parts))] or [stem]


def _unique(samples: Iterable[Sample], names_of: Callable[[Sample], Iterable[str]]) -> dict[str, Sample]:
    """The samples by the names that a function gives each; names that several samples share are left out."""
    by_name: dict[str, Sample] = {}
    twice = set()
    for sample in samples:
        for name in names_of(sample):
            if name in by_name:
                twice.add(name)
            by_name[name] = sample
    return {name: sample for name, sample in by_name.items() if name not in twice}


def _first(samples: dict[str, Sample], names: Iterable[str]) -> Sample | None:
    """The sample of the first of some names that one has."""
    return next((samples[name] for name in names if name in samples), None)
