"""Images in a folder for each class, whose captions a template makes."""

import pytest

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.layouts import read_dataset

PHOTO = ReadOptions(caption_template="a photo of a {}")


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_caption_for_each_image_from_its_folder(tmp_path):
    make(tmp_path, "cat/1.jpg", "golden_retriever/10.png", "golden_retriever/2.jpg", "x-ray__fish/1.jpg")
    dataset = read_dataset(tmp_path, options=PHOTO)
    assert (dataset.layout, dataset.ids) == (
        "class folders",
        ["cat/1.jpg", "golden_retriever/2.jpg", "golden_retriever/10.png", "x-ray__fish/1.jpg"],
    )
    captions = ["cat", "golden retriever", "golden retriever", "x ray fish"]
    assert dataset.captions == [f"a photo of a {name}" for name in captions]
    assert dataset.images.open("cat/1.jpg") == b"cat/1.jpg"
    assert dataset.taken == "class folders, 3 classes, captions from 'a photo of a {}': 4 rows"
    assert dataset.failures == []


def test_splits_above_the_classes(tmp_path):
    make(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg", "test/dog/3.jpg", "train/4.jpg", "5.jpg")
    dataset = read_dataset(tmp_path, options=PHOTO)
    assert left(dataset) == [
        ("5.jpg", "an image in no class's folder"),
        ("train/4.jpg", "an image in no class's folder"),
    ]
    assert dataset.notes[0].startswith("no split lists found: split by image with seed 0")
    (tmp_path / "train/4.jpg").unlink()
    (tmp_path / "5.jpg").unlink()
    dataset = read_dataset(tmp_path, options=PHOTO)
    assert dict(zip(dataset.ids, dataset.splits, strict=True)) == {
        "test/dog/3.jpg": "test",
        "train/cat/1.jpg": "train",
        "val/cat/2.jpg": "dev",
    }


def left(dataset):
    return sorted((failure.id, failure.reason) for failure in dataset.failures)


def test_a_class_called_train_beside_other_classes(tmp_path):
    make(tmp_path, "train/1.jpg", "bus/2.jpg")
    assert read_dataset(tmp_path, options=PHOTO).captions == ["a photo of a bus", "a photo of a train"]


def test_other_braces_of_a_template_stay(tmp_path):
    make(tmp_path, "cat/1.jpg")
    options = ReadOptions(caption_template="{0} {} and {}: {name}")
    assert read_dataset(tmp_path, options=options).captions == ["{0} cat and cat: {name}"]
    with pytest.raises(DatasetError, match="the caption template 'a photo' has no {} for the class: 'a photo of a {}'"):
        read_dataset(tmp_path, options=ReadOptions(caption_template="a photo"))


def test_without_a_template_the_error_names_it(tmp_path, fails):
    make(tmp_path / "classes", "cat/1.jpg", "dog/2.jpg")
    message = fails("info", "--data", tmp_path / "classes")
    assert "holds images without captions (cat/1.jpg, dog/2.jpg); index them with onceover index" in message
    assert message.endswith("or, where folders are classes, --caption-template 'a photo of a {}'")
    make(tmp_path / "flat", "1.jpg", "2.jpg")
    assert "--caption-template" not in fails("info", "--data", tmp_path / "flat")
    assert "--caption-template" not in fails(
        "info", "--data", tmp_path / "flat", "--caption-template", PHOTO.caption_template
    )


def test_the_command_line_takes_a_template(tmp_path, run):
    make(tmp_path, "cat/1.jpg", "dog/2.jpg")
    output = run("info", "--data", tmp_path, "--caption-template", "a drawing of a {}").stdout
    assert "class folders, 2 classes, captions from 'a drawing of a {}': 2 rows" in output
    assert "cat/1.jpg: a drawing of a cat" in output
