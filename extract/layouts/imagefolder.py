"""The Hub's imagefolder: ``metadata.jsonl`` or ``metadata.csv`` beside the images, or below ``train``, ``test``, …"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from onceover.extract.dataset.examples import ExampleImage, by_split, write_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.rows import Row, image_name
from onceover.extract.dataset.splits import split_of
from onceover.extract.dataset.table_files import tables_in
from onceover.extract.layouts import UnreadDataset
from onceover.extract.layouts._tables import dataset_of_splits, dataset_of_tables

NAME = "imagefolder"
PRIORITY = 35
LOOKED_FOR = "metadata.jsonl or metadata.csv beside the images, or below train/, validation/, test/"
EXAMPLE = '{"file_name": "a.jpg", "text": "A dog runs over a meadow ."}'
HOLDS = ("captions", "splits")
SUFFIXES = (".jsonl",)
FILES = ("metadata.jsonl", "metadata.csv")


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """``metadata.jsonl`` or ``metadata.csv`` in the folder, or in its folders that are called after splits.

    Raises:
        DatasetError: both in one folder.
    """
    if not data.is_dir():
        return None
    tables = tables_in(data, data, options, FILES)
    if not tables.tables:
        return dataset_of_splits(data, options, FILES)
    dataset = dataset_of_tables(tables, data, data, options)
    return replace(dataset, rows=partial(_with_splits, dataset.rows))


def _with_splits(rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows with splits by the folders in their images' names, where these are called after several splits."""
    read = list(rows())
    splits = [split_of(image_name(row).partition("/")[0]) for row in read]
    if any(row.split for row in read) or len({*splits} - {""}) < 2:
        yield from read
        return
    for row, split in zip(read, splits, strict=True):
        yield row._replace(split=split)


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """``metadata.jsonl`` beside its images, below a folder for each split."""
    for split, chosen in by_split(images).items():
        write_images(folder / split, chosen)
        lines = []
        for image in chosen:
            lines += [json.dumps({"file_name": image.name, "text": caption}) for caption in image.captions]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
