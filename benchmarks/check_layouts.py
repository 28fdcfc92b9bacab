"""Writes the same real photographs in every registered layout and reads them back; stops at the first difference.

    python benchmarks/check_layouts.py --data ../shared/flickr8k --images 100

In each layout the bytes and decoded pixels are the same, and the captions and splits where the form holds them.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from onceover.extract.dataset.examples import ExampleImage
from onceover.extract.dataset.reading import DEFAULT
from onceover.extract.layouts import LAYOUTS, read_dataset
from onceover.extract.pictures import decode


def real_images(data: str | Path, count: int) -> list[ExampleImage]:
    """Photographs of a dataset with their captions; each fifth of them is in dev, the others in train."""
    dataset = read_dataset(data)
    captions: dict[int, list[str]] = {}
    for caption, row in zip(dataset.captions, dataset.image_index.tolist(), strict=True):
        captions.setdefault(row, []).append(caption)
    images = []
    for row in range(count):
        content = dataset.images.open(dataset.paths[row])
        split = "dev" if row % 5 == 4 else "train"
        images.append(ExampleImage(PurePosixPath(dataset.ids[row]).name, content, _unlike(captions[row]), split))
    return sorted(images, key=lambda image: image.split, reverse=True)


def _unlike(captions: Sequence[str]) -> list[str]:
    """Captions without signs that a folder's name cannot have, or that are read as blanks in it."""
    return [caption.translate(str.maketrans("/-_", "   ")) for caption in captions]


def check_layout(name: str, images: Sequence[ExampleImage], folder: Path) -> None:
    """Writes images in a layout, reads them, and asserts that nothing was lost or changed that the form holds."""
    layout = LAYOUTS.load(name)
    options = getattr(layout, "EXAMPLE_OPTIONS", DEFAULT)
    dataset = read_dataset(layout.write_example(folder, images), options=options)
    expected = {image.name: image for image in images}
    names = [PurePosixPath(key).name for key in dataset.ids]
    assert dataset.layout == layout.NAME
    assert dataset.failures == []
    assert len(dataset.ids) == len(images)
    captions: dict[int, list[str]] = {}
    for caption, row in zip(dataset.captions, dataset.image_index.tolist(), strict=True):
        captions.setdefault(row, []).append(caption)
    for row, key in enumerate(dataset.paths):
        content = dataset.images.open(key)
        image = next(image for image in images if image.content == content)
        assert image == expected[image.name]
        if names[row] in expected:  # a form may number its images
            assert names[row] == image.name
        np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(decode(image.content)))
        count = len(image.captions) if "captions" in layout.HOLDS else 1
        assert [_words(caption) for caption in captions[row]] == [_words(text) for text in image.captions[:count]]
        if "splits" in layout.HOLDS:
            assert dataset.splits[row] == image.split


def _words(caption: str) -> str:
    return " ".join(caption.split())


def main() -> None:
    """Checks all layouts and prints how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a dataset of real photographs")
    parser.add_argument("--images", type=int, default=100)
    arguments = parser.parse_args()
    images = real_images(arguments.data, arguments.images)
    for name in LAYOUTS.names():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            check_layout(name, images, Path(folder))
            print(f"{name}: {len(images)} images, the same; {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
