"""Images that each have a text of the same name beside them, or in a parallel folder: ``a.jpg`` and ``a.txt``."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.examples import ExampleImage, by_split, write_images
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.sidecars import Sidecars
from onceover.extract.layouts import UnreadDataset, beside

NAME = "text beside"
PRIORITY = 70
LOOKED_FOR = "a text of the same name for each image"
EXAMPLE = "a.jpg and a.txt\nimages/b.jpg and captions/b.txt"
HOLDS = ("captions", "splits")
SUFFIXES = (".caption",)


def find(data: Path, options: ReadOptions) -> UnreadDataset | None:
    """A folder in which an image has a text of its own, in its own folders or in parallel ones.

    Raises:
        DatasetError: the texts hold no words.
    """
    if not data.is_dir():
        return None
    sidecars = Sidecars(data, options)
    first = sidecars.first_text()
    if not first:
        return None
    if not sidecars.has_words():
        raise DatasetError(
            f"the texts beside the images of {data} ({first}) hold no words, as labels of boxes do; write a caption "
            "a line"
        )
    suffix = PurePosixPath(first).suffix
    form = f"images with a {suffix} each, {'captions in it' if suffix == '.json' else 'a caption a line'}"
    return beside(data, data, sidecars.rows, (".",), options, form, lists_all_images=True)


def write_example(folder: Path, images: Sequence[ExampleImage]) -> Path:
    """Images, each with a text beside it, below a folder for each split."""
    for split, chosen in by_split(images).items():
        write_images(folder / split, chosen)
        for image in chosen:
            (folder / split / image.name).with_suffix(".txt").write_text("\n".join(image.captions) + "\n")
    return folder
