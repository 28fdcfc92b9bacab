"""A folder in which each image has a text or a JSON of the same name, beside it or in a parallel folder."""

import posixpath
from collections.abc import Iterator
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
        parallel = _by_parallel_name(samples)
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
                samples.setdefault(stem, Sample(stem)).add(name, ".json")
        self.samples = list(samples.values())

    def first_text(self) -> str:
        """The first text that has an image, or the first JSON that has one and holds a caption; "" where none does."""
        texts = [sample.text for sample in self.samples if sample.image and sample.text]
        if texts:
            return texts[0]
        for sample in [sample for sample in self.samples if sample.image and sample.json][:_FIRST]:
            if any(row.caption for row in sample_rows(sample, self._read, self._options)):
                return sample.json
        return ""

    def has_words(self) -> bool:
        """Whether one of the first texts has a letter in it; labels of boxes are numbers."""
        for name in [sample.text or sample.json for sample in self.samples if sample.image][:_FIRST]:
            if not name:
                continue
            try:
                content = self._read(name).decode("utf-8", "replace")
            except DatasetError:
                return True  # told when it is read again
            if any(letter.isalpha() for letter in content):
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


def _by_parallel_name(samples: dict[str, Sample]) -> dict[str, Sample]:
    """The samples by their names without that folder; names that several samples share are left out."""
    by_name: dict[str, Sample] = {}
    twice = set()
    for stem, sample in samples.items():
        name = _parallel_name(stem)
        if name in by_name:
            twice.add(name)
        by_name[name] = sample
    return {name: sample for name, sample in by_name.items() if name not in twice}
