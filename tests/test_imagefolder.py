"""The Hub's imagefolder: metadata beside the images, with splits by folders. Images are never opened."""

import json

import pytest

from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.layouts import read_dataset


def lines(*rows):
    """JSON lines of rows (name, text)."""
    return "".join(json.dumps({"file_name": name, "additional": 7, "text": text}) + "\n" for name, text in rows)


@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [
        ("metadata.jsonl", lines(("0001.png", "A dog, running"), ("sub/0002.png", "A cat")), "JSON lines"),
        ("metadata.csv", 'file_name,text\n0001.png,"A dog, running"\nsub/0002.png,A cat\n', "CSV"),
    ],
)
def test_metadata_beside_the_images(laid, file, text, kind):
    dataset = read_dataset(laid({file: text}, ["0001.png", "sub/0002.png", "0003.png"]))
    assert dataset.layout == "imagefolder"
    assert dataset.taken == f"{kind}, images from `file_name`, captions from `text`: 2 rows"
    assert dataset.ids == dataset.paths == ["0001.png", "sub/0002.png"]
    assert dataset.captions == ["A dog, running", "A cat"]
    assert dataset.failures == []


def test_metadata_below_folders_of_splits_with_equal_names(laid):
    files = {
        "train/metadata.jsonl": lines(("0.jpg", "A"), ("1.jpg", "B")),
        "validation/metadata.csv": "file_name,text\n0.jpg,C\n",
        "test/metadata.jsonl": lines(("0.jpg", "D")),
    }
    names = ["train/0.jpg", "train/1.jpg", "validation/0.jpg", "test/0.jpg"]
    dataset = read_dataset(laid(files, names))
    assert dataset.ids == dataset.paths == names
    assert dataset.captions == ["A", "B", "C", "D"]
    assert dataset.splits == ["train", "train", "dev", "test"]
    assert dataset.taken == (
        "JSON lines, images from `file_name`, captions from `text`, "
        "in train/metadata.jsonl, validation/metadata.csv, test/metadata.jsonl: 4 rows"
    )


def test_metadata_at_the_root_takes_splits_from_the_folders_in_its_names(laid):
    files = {"metadata.csv": "file_name,text\ntrain/0.jpg,A\ntest/0.jpg,B\n"}
    dataset = read_dataset(laid(files, ["train/0.jpg", "test/0.jpg"]))
    assert (dataset.ids, dataset.splits) == (["train/0.jpg", "test/0.jpg"], ["train", "test"])


def test_a_split_alone_says_nothing_of_splits(laid):
    dataset = read_dataset(laid({"train/metadata.jsonl": lines(("0.jpg", "A"))}, ["train/0.jpg"]))
    assert dataset.layout == "imagefolder"
    assert "split by image with seed 0" in dataset.notes[0]


def test_captions_in_a_column_of_another_name(laid):
    folder = laid({"metadata.csv": "file_name,beschreibung\n0.jpg,Ein Hund\n"}, ["0.jpg"])
    dataset = read_dataset(folder, options=ReadOptions(caption_columns=("beschreibung",)))
    assert (dataset.layout, dataset.captions) == ("imagefolder", ["Ein Hund"])
