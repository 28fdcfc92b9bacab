"""Small datasets that layouts write as examples of themselves, for tests and benchmarks."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class ExampleImage(NamedTuple):
    """An image of a layout's example: its file name and bytes, one or more captions, and its split or ""."""

    name: str
    content: bytes
    captions: Sequence[str]
    split: str = ""


def write_images(folder: Path, images: Iterable[ExampleImage]) -> None:
    """Writes the images of a layout's example into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        (folder / image.name).write_bytes(image.content)


def by_split(images: Sequence[ExampleImage]) -> dict[str, list[ExampleImage]]:
    """The images of each split, in their order."""
    groups: dict[str, list[ExampleImage]] = {}
    for image in images:
        groups.setdefault(image.split, []).append(image)
    return groups


def write_csv_example(captions: Path, images: Sequence[ExampleImage], with_splits: bool = False) -> None:
    """Writes the table of a layout's example, a row for each caption."""
    with captions.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "caption", "split"] if with_splits else ["image", "caption"])
        for image in images:
            for caption in image.captions:
                table.writerow([image.name, caption, image.split] if with_splits else [image.name, caption])
