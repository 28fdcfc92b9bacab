"""The contract of layouts, over all that are registered, and layouts of other packages: a tar, and a JSON file."""

import json
import pickle
import shutil
import tarfile
from pathlib import PurePosixPath

import numpy as np
import pytest

from onceover.base.files import FileError
from onceover.base.registry import RegistryError
from onceover.extract.dataset.examples import ExampleImage
from onceover.extract.dataset.reading import DEFAULT
from onceover.extract.image_source import FolderImages
from onceover.extract.layouts import LAYOUTS, images_of, read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore
from onceover.extract.verify import verify_sample


def check_contract(layout, folder):
    """Checks a layout on its own example, and on folders that are not its own."""
    foreign = folder / "foreign"
    foreign.mkdir()
    assert layout.find(foreign, DEFAULT) is None
    (foreign / "notes.md").write_text("hello")
    assert layout.find(foreign, DEFAULT) is None
    assert layout.find(foreign / "notes.md", DEFAULT) is None
    own = folder / "own"
    own.mkdir()
    contents = {"a.jpg": b"not decoded here", "b.jpg": b"nor is this"}
    captions = ["Thing 0 .", "Thing 1 ."]
    examples = [ExampleImage(*image, [caption]) for image, caption in zip(contents.items(), captions, strict=True)]
    options = getattr(layout, "EXAMPLE_OPTIONS", DEFAULT)
    data = layout.write_example(own, examples)
    rows = list(layout.find(data, options).rows())
    assert [PurePosixPath(row.image).name for row in rows] == ["a.jpg", "b.jpg"]
    dataset = read_dataset(data, options=options)
    assert dataset.layout == layout.NAME
    assert dataset.ids == [row.image for row in rows]
    assert dataset.captions == captions
    assert set(dataset.splits) <= {"train", "dev", "test"}
    assert dataset.failures == []
    images = pickle.loads(pickle.dumps(dataset.images))
    for name, key in zip(contents, dataset.paths, strict=True):
        assert images.open(key) == contents[name]
        size, mtime_ns = images.stat(key)
        assert size >= len(contents[name])  # or that of the file that the image lies in
        assert mtime_ns > 0
        assert name in images.describe(key)
    assert images.stat("no such key") == (-1, -1)
    with pytest.raises((OSError, FileError)):
        images.open("no such key")
    again = images_of(data, dataset.paths, options)
    assert again.open(dataset.paths[0]) == contents["a.jpg"]


@pytest.mark.parametrize("name", LAYOUTS.names())
def test_a_registered_layout_keeps_the_contract(tmp_path, name):
    check_contract(LAYOUTS.load(name), tmp_path)


def test_names_and_priorities_differ_so_that_the_order_is_stated():
    layouts = [LAYOUTS.load(name) for name in LAYOUTS.names()]
    assert len({layout.PRIORITY for layout in layouts}) == len(layouts)
    assert len({layout.NAME for layout in layouts}) == len(layouts)


def test_trap_stores_know_layouts_by_these_names():
    names = {name: LAYOUTS.load(name).NAME for name in ("csv_table", "flickr8k", "kaggle", "karpathy")}
    assert names == {"csv_table": "csv", "flickr8k": "original", "kaggle": "kaggle", "karpathy": "karpathy"}
    for name in ("coco", "flickr30k", "imagefolder"):
        assert name == LAYOUTS.load(name).NAME


def test_trap_a_stores_listing_covers_these_reasons_so_that_they_keep_their_spelling(tmp_path):
    (tmp_path / "Images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "Images" / name).write_bytes(b"x")
    lines = ["image,caption", "a.jpg,A dog .", "z.jpg,A cat .", "b.jpg,"]
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\nghost.jpg\n")
    assert [failure[:3] for failure in read_dataset(tmp_path).failures] == [
        ("z.jpg", "dataset", "no such picture in Images/: 'A cat .'"),
        ("b.jpg", "caption", "empty caption: ''"),
        ("b.jpg", "dataset", "no usable caption"),
        ("c.jpg", "dataset", "picture without captions"),
        ("ghost.jpg", "split", "listed in train, but not a usable picture"),
    ]


def test_the_images_of_a_store_are_found_without_its_captions(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert images_of(tmp_path, ["gone.jpg", "a.jpg"]).open("a.jpg") == b"x"
    assert images_of(tmp_path / "gone.csv", ["a.jpg"]).open("a.jpg") == b"x"
    absent = images_of(tmp_path, ["gone.jpg"])
    assert absent.describe("gone.jpg") == str(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError):
        absent.open("gone.jpg")


def test_a_broken_layout_of_another_package_is_named(outside, tmp_path):
    outside("onceover.layouts", "broken", "import no_such_module_at_all")
    with pytest.raises(RegistryError, match="the layout 'broken' of the package outside-0 cannot be imported"):
        read_dataset(tmp_path)


TAR = """
import csv
import io
import tarfile

from onceover.extract.dataset.rows import Row
from onceover.extract.image_source import ImageSource
from onceover.extract.layouts import UnreadDataset

NAME = "tar"
PRIORITY = 5
LOOKED_FOR = "a .tar with captions.csv"
EXAMPLE = "captions.csv, a.jpg in data.tar"
SUFFIXES = (".tar",)

class TarImages(ImageSource):
    def __init__(self, path):
        self.path = path

    def open(self, key):
        with tarfile.open(self.path) as tar:
            try:
                return tar.extractfile(key).read()
            except KeyError as error:
                raise FileNotFoundError(f"{key} is not in {self.path}") from error

    def stat(self, key):
        with tarfile.open(self.path) as tar:
            try:
                member = tar.getmember(key)
            except KeyError:
                return -1, -1
            return member.size, int(member.mtime * 10**9)

def find(data, options):
    if data.suffix != ".tar":
        return None
    return UnreadDataset(data.parent, data, lambda: rows(data), lambda rows: TarImages(data))

def rows(captions):
    with tarfile.open(captions) as tar:
        text = tar.extractfile("captions.csv").read().decode()
    for row in csv.DictReader(io.StringIO(text)):
        yield Row(row["image"], row["caption"])

def write_example(folder, images):
    lines = [f"{image.name},{image.captions[0]}" for image in images]
    table = "\\n".join(["image,caption", *lines]).encode()
    contents = {image.name: image.content for image in images}
    with tarfile.open(folder / "data.tar", "w") as tar:
        for name, content in {"captions.csv": table, **contents}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = 1_000_000_000
            tar.addfile(member, io.BytesIO(content))
    return folder / "data.tar"
"""


def test_layouts_of_other_packages_keep_the_contract_too(outside, tmp_path):
    outside("onceover.layouts", "tar", TAR)
    outside("onceover.layouts", "album", ALBUM)
    assert {"album", "tar"} < set(LAYOUTS.names())
    for name in ("album", "tar"):
        (tmp_path / name).mkdir()
        check_contract(LAYOUTS.load(name), tmp_path / name)


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
    assert [failure[:3] for failure in dataset.failures] == [("absent.jpg", "dataset", "no such picture: 'Nothing .'")]
    extract(dataset, tmp_path / "tar.h5", extract_config, device="cpu")
    extract(read_dataset(folder), tmp_path / "folder.h5", extract_config, device="cpu")
    with FeatureStore(tmp_path / "tar.h5") as one, FeatureStore(tmp_path / "folder.h5") as other:
        assert one.image_ids == other.image_ids
        np.testing.assert_array_equal(one.image_features[:], other.image_features[:])
        np.testing.assert_array_equal(one.text_features[:], other.text_features[:])
        assert verify_sample(one, 4, data=tmp_path / "data.tar", device="cpu")[1] == []
    assert extract(read_dataset(tmp_path / "data.tar"), tmp_path / "tar.h5", extract_config, device="cpu").up_to_date


ALBUM = """
import json

from onceover.extract.dataset.examples import write_images
from onceover.extract.dataset.rows import Row
from onceover.extract.layouts import beside

NAME = "album"
PRIORITY = 6
LOOKED_FOR = "album.json (with photos/)"
EXAMPLE = "album.json beside photos/"
SUFFIXES = (".json",)

def find(data, options):
    captions = data / "album.json"
    return beside(captions, data, lambda: rows(captions), ("photos",), options) if captions.is_file() else None

def rows(captions):
    content = json.loads(captions.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        yield Row(names[annotation["image_id"]], annotation["caption"], "dev")

def write_example(folder, images):
    write_images(folder / "photos", images)
    entries = [{"id": number, "file_name": image.name} for number, image in enumerate(images)]
    annotations = [{"image_id": number, "caption": image.captions[0]} for number, image in enumerate(images)]
    content = {"images": entries, "annotations": annotations}
    (folder / "album.json").write_text(json.dumps(content))
    return folder
"""


def test_another_package_adds_a_layout_of_files_in_one_file(outside, tmp_path):
    outside("onceover.layouts", "album", ALBUM)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/7.jpg").write_bytes(b"x")
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": "A dog ."}, {"image_id": 7, "caption": "A brown dog ."}],
    }
    (tmp_path / "album.json").write_text(json.dumps(content))
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.captions, dataset.splits) == ("album", ["A dog .", "A brown dog ."], ["dev"])
    assert isinstance(dataset.images, FolderImages)
    assert dataset.paths == ["photos/7.jpg"]
