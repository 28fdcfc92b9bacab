"""Folders that img2dataset writes with ``--output_format files``: ``00000/000000000.jpg``, its .txt and its .json."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from onceover.extract.dataset.downloads import missing_rows, note_on_unread
from onceover.extract.dataset.examples import ExampleImage, write_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row
from onceover.extract.dataset.sidecars import Sidecars
from onceover.extract.layouts import UnreadDataset, beside

NAME = "img2dataset"
PRIORITY = 34
LOOKED_FOR = "img2dataset's 00000/ (with 00000.parquet or 00000_stats.json)"
EXAMPLE = "00000/000000000.jpg and 00000/000000000.txt\n00000_stats.json"
HOLDS = ()
SUFFIXES = (".parquet",)


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """A folder with ``00000/`` beside ``00000.parquet`` or ``00000_stats.json``."""
    if not data.is_dir():
        return None
    shards = sorted(path.name for path in data.iterdir() if path.name.isdecimal() and path.is_dir())
    shards = [name for name in shards if (data / f"{name}.parquet").is_file() or (data / _stats(name)).is_file()]
    if not shards:
        return None
    lists = [data / f"{name}.parquet" for name in shards]
    lists = [path for path in lists if path.is_file()]
    source = _Shards(data, lists, options)
    form = f"img2dataset, {len(shards):,} folder{'s' if len(shards) > 1 else ''}{note_on_unread(lists)}"
    return beside(data, data, source.rows, (".",), options, form, lists_all_images=True)


def _stats(shard: str) -> str:
    return f"{shard}_stats.json"


class _Shards:
    """Folders of images, and the Parquet files that list what should be in them."""

    def __init__(self, data: Path, lists: list[Path], options: ReadOptions):
        self._data = data
        self._lists = lists
        self._options = options

    def rows(self) -> Iterator[Row]:
        """The captions of all images, and a row with its fault for each that was not downloaded."""
        sidecars = Sidecars(self._data, self._options)
        yield from sidecars.rows()
        if note_on_unread(self._lists):
            return
        keys: dict[str, set[str]] = {}
        for sample in sidecars.samples:
            shard, _, key = sample.name.rpartition("/")
            keys.setdefault(shard, set()).add(key)
        for path in self._lists:
            yield from missing_rows(path, keys.get(path.stem, set()), f"{path.stem}/")


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """A folder of images with their texts, beside the statistics of it."""
    write_images(folder / "00000", images)
    for image in images:
        (folder / "00000" / image.name).with_suffix(".txt").write_text(image.captions[0])
    (folder / "00000_stats.json").write_text(json.dumps({"count": len(images), "successes": len(images)}))
    return folder
