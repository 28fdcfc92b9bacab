"""What every registered layout must do, and layouts of other packages: a tar, and COCO's own JSON."""

import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from onceover.extract.image_source import FolderImages
from onceover.extract.layouts import LAYOUTS, read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore

JPEG = b"not decoded here"


def example(name, folder):
    """A small dataset of a layout, with the images a.jpg and b.jpg."""
    if name == "karpathy":
        sentences = [{"raw": "A dog ."}]
        images = [{"filename": f"{stem}.jpg", "split": "train", "sentences": sentences} for stem in "ab"]
        (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
        below = folder
    elif name == "flickr8k":
        (folder / "Flickr8k.token.txt").write_text("a.jpg#0\tA dog .\nb.jpg#0\tA cat .\n")
        below = folder / "Flicker8k_Dataset"
    elif name == "kaggle":
        (folder / "captions.txt").write_text("image,caption\na.jpg,A dog .\nb.jpg,A cat .\n")
        below = folder / "Images"
    else:
        assert name == "csv", f"an example of the layout {name} is missing here"
        (folder / "data.csv").write_text("image,caption\na.jpg,A dog .\nb.jpg,A cat .\n")
        below = folder
    below.mkdir(exist_ok=True)
    for stem in "ab":
        (below / f"{stem}.jpg").write_bytes(JPEG)


@pytest.mark.parametrize("name", LAYOUTS.names())
def test_each_layout_finds_its_own_and_gives_rows_and_images(tmp_path, name):
    layout = LAYOUTS.load(name)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.md").write_text("hello")
    assert layout.find(tmp_path / "foreign") is None
    assert layout.find(tmp_path / "foreign/notes.md") is None
    (tmp_path / "own").mkdir()
    example(name, tmp_path / "own")
    captions = layout.find(tmp_path / "own")
    rows = list(layout.rows(captions))
    assert [row.image for row in rows] == ["a.jpg", "b.jpg"]
    dataset = read_dataset(tmp_path / "own")
    assert dataset.layout == name
    images = pickle.loads(pickle.dumps(dataset.images))
    assert [images.open(key) for key in dataset.paths] == [JPEG, JPEG]
    assert images.stat(dataset.paths[0])[0] == len(JPEG)
    assert images.stat("no such key") == (-1, -1)


def test_priorities_differ_so_that_the_order_is_stated():
    priorities = [LAYOUTS.load(name).PRIORITY for name in LAYOUTS.names()]
    assert len(set(priorities)) == len(priorities)


TAR = '''
import csv
import io
import tarfile

from onceover.extract.dataset.rows import Row
from onceover.extract.image_source import ImageSource

PRIORITY = 5
LOOKED_FOR = "a .tar with captions.csv"
LISTS_ALL_IMAGES = False

class TarImages(ImageSource):
    def __init__(self, path):
        self.path = path

    def open(self, key):
        with tarfile.open(self.path) as tar:
            return tar.extractfile(key).read()

    def stat(self, key):
        with tarfile.open(self.path) as tar:
            try:
                member = tar.getmember(key)
            except KeyError:
                return -1, -1
            return member.size, int(member.mtime * 10**9)

def find(data):
    return data if data.suffix == ".tar" else None

def rows(captions):
    with tarfile.open(captions) as tar:
        text = tar.extractfile("captions.csv").read().decode()
    for row in csv.DictReader(io.StringIO(text)):
        yield Row(row["image"], row["caption"])

def images(root, rows, captions):
    return TarImages(captions)
'''


def test_another_package_adds_a_layout_whose_images_lie_in_a_tar(outside, drawn, tmp_path, extract_config):
    outside("onceover.layouts", "tar", TAR)
    folder = tmp_path / "folder"
    folder.mkdir()
    names = sorted(path.name for path in drawn.rglob("*.jpg"))[:6]
    for name in names:
        shutil.copy2(next(drawn.rglob(name)), folder / name)
    lines = ["image,caption", *(f"{name},A thing {number} ." for number, name in enumerate(names))]
    (folder / "captions.csv").write_text("\n".join([*lines, "absent.jpg,Nothing ."]) + "\n")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    dataset = read_dataset(tmp_path / "data.tar")
    assert (dataset.layout, dataset.ids) == ("tar", names)
    assert [failure[:2] for failure in dataset.failures] == [("absent.jpg", "dataset")]
    extract(dataset, tmp_path / "tar.h5", extract_config, device="cpu")
    extract(read_dataset(folder), tmp_path / "folder.h5", extract_config, device="cpu")
    with FeatureStore(tmp_path / "tar.h5") as one, FeatureStore(tmp_path / "folder.h5") as other:
        assert one.image_ids == other.image_ids
        np.testing.assert_array_equal(one.image_features[:], other.image_features[:])
        np.testing.assert_array_equal(one.text_features[:], other.text_features[:])
    assert extract(read_dataset(tmp_path / "data.tar"), tmp_path / "tar.h5", extract_config, device="cpu").up_to_date


COCO = '''
import json

from onceover.extract.dataset.rows import Row, folder_images

PRIORITY = 6
LOOKED_FOR = "captions_val2017.json (with val2017/)"
LISTS_ALL_IMAGES = False

def find(data):
    captions = data / "captions_val2017.json"
    return captions if captions.is_file() else None

def rows(captions):
    content = json.loads(captions.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        yield Row(names[annotation["image_id"]], annotation["caption"], "dev")

def images(root, rows, captions):
    return folder_images(root, ("val2017",), rows, captions)
'''


def test_another_package_adds_a_layout_of_files_in_one_file(outside, tmp_path):
    outside("onceover.layouts", "coco", COCO)
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017/7.jpg").write_bytes(JPEG)
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": "A dog ."}, {"image_id": 7, "caption": "A brown dog ."}],
    }
    (tmp_path / "captions_val2017.json").write_text(json.dumps(content))
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.captions, dataset.splits) == ("coco", ["A dog .", "A brown dog ."], ["dev"])
    assert isinstance(dataset.images, FolderImages)
    assert dataset.paths == ["val2017/7.jpg"]
