"""COCO's captions as published, both years, several splits at once. Images are never opened."""

import json

import pytest

from onceover.extract.dataset import DatasetError
from onceover.extract.layouts import read_dataset


def captions(*images):
    """A file of captions, of images as (number, name, captions), in the order of the published files."""
    entries = []
    annotations = []
    for number, name, texts in images:
        url = f"http://images.cocodataset.org/{name}"
        entries.append({"license": 3, "file_name": name, "coco_url": url, "height": 427, "width": 640, "id": number})
        annotations += [{"image_id": number, "id": 7 * number, "caption": text} for text in texts]
    content = {"info": {"year": 2017}, "licenses": [], "images": entries, "annotations": annotations}
    return json.dumps(content)


TRAIN = captions((9, "000000000009.jpg", ["A plate.", "Food. \n"]), (25, "000000000025.jpg", []))
VAL = captions((139, "000000000139.jpg", ["A room."]))
INSTANCES = json.dumps({"images": [{"id": 139, "file_name": "000000000139.jpg"}], "annotations": [{"image_id": 139}]})
IMAGES = ("train2017/000000000009.jpg", "train2017/000000000025.jpg", "val2017/000000000139.jpg")


@pytest.mark.parametrize("parent", ["", "images/"])
def test_train_and_val_together_with_splits_by_file(laid, parent):
    files = {"annotations/captions_train2017.json": TRAIN, "annotations/captions_val2017.json": VAL}
    files |= {"annotations/instances_val2017.json": INSTANCES, "annotations/image_info_test2017.json": '{"images": []}'}
    dataset = read_dataset(laid(files, [f"{parent}{name}" for name in IMAGES]))
    assert dataset.layout == "coco"
    assert dataset.taken == "COCO's captions, captions_train2017.json, captions_val2017.json: 4 rows"
    assert dataset.ids == dataset.paths == [f"{parent}{IMAGES[0]}", f"{parent}{IMAGES[2]}"]
    assert dataset.captions == ["A plate.", "Food.", "A room."]
    assert dataset.image_index.tolist() == [0, 0, 1]
    assert dataset.splits == ["train", "dev"]
    assert [failure[:3] for failure in dataset.failures] == [
        (f"{parent}{IMAGES[1]}", "caption", "empty caption: ''"),
        (f"{parent}{IMAGES[1]}", "dataset", "no usable caption"),
    ]


def test_one_file_named_as_data(laid):
    folder = laid({"annotations/captions_val2017.json": VAL}, [IMAGES[2]])
    dataset = read_dataset(folder / "annotations/captions_val2017.json")
    assert (dataset.layout, dataset.ids, dataset.paths) == ("coco", ["000000000139.jpg"], [IMAGES[2]])
    assert "not the published split" in dataset.notes[0]


def test_of_two_years_that_is_taken_whose_images_are_there(laid):
    files = {f"annotations/captions_{part}.json": text for part, text in (("train2017", TRAIN), ("val2017", VAL))}
    names = ("train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000042.jpg")
    for number, name in ((9, names[0]), (42, names[1])):
        folder, _, file = name.partition("/")
        files[f"annotations/captions_{folder}.json"] = captions((number, file, [f"Image {number}."]))
    dataset = read_dataset(laid(files, names))
    assert (dataset.ids, dataset.splits) == (list(names), ["train", "dev"])
    assert "(left alone: captions_train2017.json, captions_val2017.json)" in dataset.taken
    assert read_dataset(laid({}, IMAGES)).ids == [IMAGES[0], IMAGES[2]]


def test_a_split_whose_images_are_not_there_is_left_alone_and_said(laid):
    files = {"annotations/captions_train2017.json": TRAIN, "annotations/captions_val2017.json": VAL}
    folder = laid(files, [IMAGES[2]])
    dataset = read_dataset(folder)
    assert dataset.ids == [IMAGES[2]]
    train = folder / "annotations/captions_train2017.json"
    assert dataset.notes[0].startswith(f"none of the 2 images that {train} names is there; its rows (3) are left out")


def test_files_of_the_same_form_by_other_names(laid):
    files = {
        "annotations/train.json": captions((0, "VizWiz_train_00000000.jpg", ["A can."])),
        "annotations/val.json": captions((1, "VizWiz_val_00000000.jpg", ["A box."])),
        "annotations/test.json": json.dumps({"images": [{"id": 2, "file_name": "VizWiz_test_00000000.jpg"}]}),
    }
    names = [f"{split}/VizWiz_{split}_00000000.jpg" for split in ("train", "val", "test")]
    dataset = read_dataset(laid(files, names))
    assert (dataset.layout, dataset.ids, dataset.splits) == ("coco", names[:2], ["train", "dev"])


def test_captions_that_their_publisher_rejected_go_into_the_ledger(laid):
    content = json.loads(VAL)
    content["annotations"][0]["is_rejected"] = False
    content["annotations"].append({"image_id": 139, "caption": "Quality issues.", "is_rejected": True})
    dataset = read_dataset(laid({"captions_val2017.json": json.dumps(content)}, [IMAGES[2]]))
    assert dataset.captions == ["A room."]
    assert [failure[:3] for failure in dataset.failures] == [
        (IMAGES[2].rpartition("/")[2], "dataset", "rejected by its publisher: 'Quality issues.'")
    ]


def test_an_annotation_of_an_image_that_is_not_listed_goes_into_the_ledger(laid):
    content = json.loads(VAL)
    content["annotations"].append({"image_id": 5, "id": 1, "caption": "Nothing."})
    dataset = read_dataset(laid({"captions_val2017.json": json.dumps(content)}, [IMAGES[2]]))
    assert dataset.captions == ["A room."]
    assert [failure[:3] for failure in dataset.failures] == [
        ("image_id 5", "dataset", "no such picture in val2017/: 'Nothing.'")
    ]


def test_an_id_of_two_images_gives_none_of_them_a_caption(laid):
    content = json.loads(VAL)
    content["images"].append({"id": "139", "file_name": "b.jpg"})
    content["images"].append({"id": 7, "file_name": "c.jpg"})
    content["annotations"].append({"image_id": "7", "id": 1, "caption": "A cat."})
    content["annotations"].append({"image_id": 7, "id": 2, "caption": None})
    dataset = read_dataset(laid({"captions_val2017.json": json.dumps(content)}, [IMAGES[2], "val2017/c.jpg"]))
    assert (dataset.ids, dataset.captions) == (["c.jpg"], ["A cat."])
    assert [failure[:3] for failure in dataset.failures] == [
        ("image_id 139", "dataset", "several images have the id 139: 000000000139.jpg, b.jpg: 'A room.'"),
        ("c.jpg", "caption", "empty caption: ''"),
    ]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "instances_val2017.json",
            INSTANCES,
            "is not as COCO's captions are (KeyError: 'caption'); it needs images with",
        ),
        ("captions_val2017.json", captions((139, "000000000139.jpg", [])), "no image is usable; the first reason"),
        ("captions_val2017.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": 7}', "TypeError"),
        ("captions_val2017.json", VAL[:-9], "is not as COCO's captions are (JSONDecodeError"),
    ],
)
def test_a_file_that_is_not_as_cocos_is_told_in_a_line(laid, file, text, message):
    with pytest.raises(DatasetError) as error:
        read_dataset(laid({file: text}, [IMAGES[2]]) / file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
