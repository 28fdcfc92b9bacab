"""Folders in which each image has a text of its own: beside it, in a parallel folder, below folders of splits."""

import json

import pytest

from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.layouts import read_dataset


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def left_out(dataset):
    return [(failure.id, failure.stage, failure.reason) for failure in dataset.failures]


def test_texts_beside_images_a_caption_a_line(tmp_path):
    files = {
        "10.jpg": b"ten",
        "10.txt": "Ten .",
        "2.JPG": b"two",
        "2.txt": "\ufeffTwo .\r\n\r\n  Another . \r\n",
        "a/b.c.png": b"deep",
        "a/b.c.caption": "Deep .",
        "x.jpg": b"x",
        "x.jpg.txt": "Named by the whole name .",
        "._2.txt": "of macOS",
    }
    dataset = read_dataset(write_files(tmp_path, files))
    assert (dataset.layout, dataset.ids) == ("text beside", ["2.JPG", "10.jpg", "a/b.c.png", "x.jpg"])
    assert dataset.captions == ["Two .", "Another .", "Ten .", "Deep .", "Named by the whole name ."]
    assert dataset.image_index.tolist() == [0, 0, 1, 2, 3]
    assert [dataset.images.open(key) for key in dataset.paths] == [b"two", b"ten", b"deep", b"x"]
    assert dataset.failures == []
    assert dataset.taken == "images with a .txt each, a caption a line: 5 rows"


def test_images_without_a_text_and_texts_without_an_image_go_into_the_ledger(tmp_path):
    files = {
        "a.jpg": b"x",
        "a.txt": "A dog .",
        "a.png": b"of the same name",
        "b.jpg": b"no text",
        "c.txt": "No image .",
        "d.jpg": b"an empty text",
        "d.txt": "\n",
        "e.jpg": b"not UTF-8",
        "e.txt": b"caf\xe9",
        "LICENSE.txt": "Free .",
        "notes.md": "hello",
    }
    dataset = read_dataset(write_files(tmp_path, files))
    assert dataset.ids == ["a.jpg"]
    assert sorted(left_out(dataset)) == [
        ("LICENSE.txt", "dataset", "text without an image"),
        ("a.png", "dataset", "another image of the sample: a.jpg is taken"),
        ("b.jpg", "dataset", "picture without captions"),
        ("c.txt", "dataset", "text without an image"),
        ("d.jpg", "caption", "empty caption: ''"),
        ("d.jpg", "dataset", "no usable caption"),
        ("e.jpg", "dataset", "its text is not UTF-8"),
    ]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("images/a.jpg", "captions/a.txt"),
        ("images/x/a.jpg", "captions/x/a.txt"),
        ("train/images/a.jpg", "train/captions/a.txt"),
        ("Images/a.jpg", "a.txt"),
        ("img/a.jpg", "texts/a.txt"),
    ],
)
def test_texts_in_a_parallel_folder(tmp_path, image, text):
    dataset = read_dataset(write_files(tmp_path, {image: b"x", text: "A dog ."}))
    assert (dataset.layout, dataset.ids, dataset.captions) == ("text beside", [image], ["A dog ."])
    assert dataset.failures == []


def test_an_ambiguous_parallel_name_is_taken_for_none(tmp_path):
    files = {"images/a.jpg": b"x", "photos/a.jpg": b"y", "captions/a.txt": "Whose ?", "images/b.jpg": b"z"}
    files["captions/b.txt"] = "A dog ."
    dataset = read_dataset(write_files(tmp_path, files))
    assert dataset.ids == ["images/b.jpg"]
    assert ("captions/a.txt", "dataset", "text without an image") in left_out(dataset)


def test_images_below_another_root(tmp_path):
    write_files(tmp_path / "photos", {"x/a.jpg": b"x", "b.jpg": b"y"})
    write_files(tmp_path / "texts", {"x/a.txt": "A dog ."})
    (tmp_path / "texts/b.jpg").write_bytes(b"not this")
    dataset = read_dataset(tmp_path / "texts", options=ReadOptions(images_root=tmp_path / "photos"))
    assert (dataset.ids, dataset.images.open("x/a.jpg")) == (["x/a.jpg"], b"x")


def test_splits_by_folders(tmp_path):
    files = {}
    for number, folder in enumerate(("train", "train", "val", "test")):
        files[f"{folder}/{number}.jpg"] = b"x"
        files[f"{folder}/{number}.txt"] = f"Caption {number} ."
    dataset = read_dataset(write_files(tmp_path, files))
    assert dict(zip(dataset.ids, dataset.splits, strict=True)) == {
        "test/3.jpg": "test",
        "train/0.jpg": "train",
        "train/1.jpg": "train",
        "val/2.jpg": "dev",
    }
    write_files(tmp_path, {"more/4.jpg": b"x", "more/4.txt": "In no split ."})
    assert read_dataset(tmp_path).notes[0].startswith("no split lists found: split by image with seed 0")


def test_json_beside_an_image_without_a_text(tmp_path):
    files = {
        "a.jpg": b"x",
        "a.txt": "A dog .",
        "b.jpg": b"x",
        "b.json": json.dumps({"caption": "From JSON ."}),
        "c.json": json.dumps({"status": "failed_to_download", "error_message": "HTTP 404"}),
        "d.json": json.dumps({"version": 1}),
    }
    dataset = read_dataset(write_files(tmp_path, files))
    assert dataset.captions == ["A dog .", "From JSON ."]
    assert left_out(dataset) == [("c", "dataset", "not downloaded: failed_to_download, HTTP 404")]


def test_json_alone_beside_images(tmp_path):
    files = {"a.jpg": b"x", "a.json": "{}", "b.jpg": b"y", "b.json": json.dumps({"title": "From JSON ."})}
    dataset = read_dataset(write_files(tmp_path, files))
    assert (dataset.ids, dataset.captions) == (["b.jpg"], ["From JSON ."])
    assert dataset.taken == "images with a .json each, captions in it: 1 rows"
    assert left_out(dataset) == [("a.jpg", "dataset", "picture without captions")]


def test_labels_of_boxes_are_not_taken_for_captions(tmp_path):
    files = {"images/a.jpg": b"x", "images/a.txt": "0 0.5 0.5 0.25 0.25\n1 0.1 0.2 0.3 0.4\n"}
    with pytest.raises(DatasetError, match=r"\(images/a.txt\) hold no words, as labels of boxes do; write a caption"):
        read_dataset(write_files(tmp_path, files))


def test_a_table_comes_before_texts_beside(tmp_path):
    files = {"a.jpg": b"x", "a.txt": "Beside .", "captions.csv": "image,caption\na.jpg,From the table .\n"}
    assert read_dataset(write_files(tmp_path, files)).captions == ["From the table ."]


def test_texts_in_any_folder_go_with_the_only_image_whose_path_ends_alike(tmp_path):
    files = {
        "dataset/cat/1.jpg": b"cat",
        "dataset/dog/1.jpg": b"dog",
        "dataset/dog/2.jpg": b"two",
        "dataset/dog/3.jpg": b"three",
        "sentence/cat/1.txt": "A cat .\nCat .",
        "sentence/dog/1.txt": "A dog .",
        "sentence/2.txt": "Two dogs .",
        "sentence/dog/3.txt": "Three dogs .",
        "sentence/other/3.txt": "Another three .",
        "sentence/1.txt": "A dog or a cat .",
    }
    dataset = read_dataset(write_files(tmp_path, files))
    assert dataset.ids == ["dataset/cat/1.jpg", "dataset/dog/1.jpg", "dataset/dog/2.jpg"]
    assert dataset.captions == ["A cat .", "Cat .", "A dog .", "Two dogs ."]
    assert sorted(left_out(dataset)) == [
        ("dataset/dog/3.jpg", "dataset", "picture without captions"),
        ("sentence/1.txt", "dataset", "text without an image"),
        ("sentence/dog/3.txt", "dataset", "text without an image"),
        ("sentence/other/3.txt", "dataset", "text without an image"),
    ]


def test_labels_in_another_folder_are_no_captions(tmp_path):
    label = "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64\n"
    write_files(tmp_path, {"image_2/000001.png": b"x", "label_2/000001.txt": label})
    with pytest.raises(DatasetError, match="hold no words, as labels of boxes do"):
        read_dataset(tmp_path)


def test_a_title_that_is_the_files_name_is_no_caption(tmp_path):
    files = {}
    for name, description in (("a", "A dog ."), ("b", "")):
        files[f"{name}.jpg"] = b"x"
        files[f"{name}.json"] = json.dumps({"title": f"{name}.jpg", "description": description})
    files["c.jpg"] = b"x"
    files["c.jpg.metadata.json"] = json.dumps({"title": "c.jpg", "description": "A cat ."})
    files["d.jpg"] = b"x"
    files["d.jpg.json"] = json.dumps({"title": "d.jpg", "description": "A cow ."})
    dataset = read_dataset(write_files(tmp_path, files))
    assert (dataset.ids, dataset.captions) == (["a.jpg", "c.jpg", "d.jpg"], ["A dog .", "A cat .", "A cow ."])
    assert left_out(dataset) == [
        ("b.jpg", "caption", "empty caption: ''"),
        ("b.jpg", "dataset", "no usable caption"),
    ]
