"""Imported features: what the files hold, bit for bit, in every format and pairing; what is refused, and how."""

import csv
import json
import os
import pickle
import shutil
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import save_file

from onceover.base.errors import OnceoverError
from onceover.base.files import FileError, check_disk
from onceover.extract import arrays
from onceover.extract import store as store_module
from onceover.extract.arrays import open_array
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.encoders import EncoderError, parse_spec
from onceover.extract.import_sources import read_rows
from onceover.extract.importing import import_features
from onceover.extract.layouts import read_dataset
from onceover.extract.ledger import Failure
from onceover.extract.store import FeatureStore

PICTURES = ["b.jpg", "a.jpg", "b.jpg", "c.jpg", "a.jpg"]
ROWS = [(name, f"caption {row}", "train") for row, name in enumerate(PICTURES)]
NO_ENCODER = "these features were imported, and there is no encoder to embed a query or to extend the store with"


def write(file: Path, array: np.ndarray) -> Path:
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, array, allow_pickle=True)
    elif file.suffix == ".safetensors":
        save_file({"features": np.ascontiguousarray(array)}, file)
    else:
        lists = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
        lists = lists if array.dtype == np.float32 else lists.cast(pa.list_(lists.type.value_type))
        parquet.write_table(pa.table({"embedding": lists, "row": range(len(array))}), file, row_group_size=4)
    return file


def table(file: Path, rows=ROWS, columns=("image", "caption", "split")) -> Path:
    if file.suffix == ".parquet":
        file.parent.mkdir(exist_ok=True)
        values = zip(*rows, strict=True) if rows else [[]] * len(columns)
        parquet.write_table(pa.table(dict(zip(columns, map(list, values), strict=True))), file)
    else:
        with open(file, "w", encoding="utf-8", newline="") as opened:
            csv.writer(opened).writerows([columns, *(row[: len(columns)] for row in rows)])
    return file


def numbers(*shape, seed=0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def given_files(tmp_path, told):
    """Five captions of three images: the arrays, and a call that imports what lies in the files."""
    images, texts = numbers(3, 4), numbers(5, 6, seed=1)
    files = {
        "image_features": write(tmp_path / "image.npy", images),
        "text_features": write(tmp_path / "text.npy", texts),
        "captions": table(tmp_path / "table.csv"),
        "path": tmp_path / "store.h5",
    }
    said = told

    def run(**others):
        said.clear()
        return import_features(**files | others)

    return types.SimpleNamespace(images=images, texts=texts, run=run, said=said, folder=tmp_path, **files)


def refusal(given_files, **others) -> str:
    """The message of a refused import, which has left nothing behind."""
    before = {path: path.stat().st_mtime_ns for path in given_files.folder.rglob("*")}
    with pytest.raises(OnceoverError) as raised:
        given_files.run(**others)
    assert {path: path.stat().st_mtime_ns for path in given_files.folder.rglob("*")} == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_format_comes_through_bit_for_bit(data):
    suffix = data.draw(st.sampled_from([".npy", ".safetensors", ".parquet"]))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=20))
    different, dim = list(dict.fromkeys(names)), data.draw(st.integers(1, 4))
    views = data.draw(st.integers(0, 2)) if suffix != ".parquet" else 0
    images = numbers(len(different), *([views] if views else []), dim, dtype=dtype)
    texts = numbers(len(names), 3, seed=1, dtype=dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(names)), max_size=3)))
    paired = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as temporary, patch.object(arrays, "BLOCK", 3):
        folder = Path(temporary)
        rows = images[[different.index(name) for name in names]] if paired else images
        write(folder / f"image{suffix}", rows)
        for number, part in enumerate(np.split(texts, cuts)):
            write(folder / f"text/part-{number}{suffix}", part)
        file = folder / data.draw(st.sampled_from(["t.csv", "t.parquet"]))
        captions = table(file, [(name, "a caption", "") for name in names])
        import_features(folder / f"image{suffix}", folder / "text", captions, folder / "s.h5")
        with FeatureStore(folder / "s.h5") as store:
            stored = np.float16 if dtype == np.float16 else np.float32
            assert store.image_features.dtype == store.text_features.dtype == stored
            expected = images.astype(stored).reshape(len(different), max(views, 1), dim)
            np.testing.assert_array_equal(store.image_features[:], expected)
            np.testing.assert_array_equal(store.text_features[:], texts.astype(stored))
            assert store.image_ids == store.image_paths == different
            assert [different[row] for row in store.image_index] == names
            assert not store.truncated.any()
            assert store.verify() == []


def test_a_store_says_where_its_features_came_from(given_files):
    summary = given_files.run(name="my encoder")
    assert (summary.images, summary.captions, summary.up_to_date) == (3, 5, False)
    assert given_files.said == ["importing features of 3 images and 5 captions"]
    with FeatureStore(given_files.path) as store:
        assert store.image_splits == ["train"] * 3
        assert store.provenance["image"]["encoder"] == store.provenance["text"]["encoder"] == "import:my encoder"
        assert store.provenance["text"]["source"] == str(given_files.text_features)
        assert store.provenance["data"] == str(given_files.folder)
        assert store.recipes["image"]["shape"] == [1, 4]
        assert store.recipes["image"]["pooling"] != "projection"  # or it would pass for a dual encoder's
        assert len(set(store.sha256)) == 3
        assert store.thumbnails() is None


def test_shards_are_joined_in_natural_order(given_files):
    for number, part in zip((10, 2, 1), np.split(given_files.texts, [1, 3]), strict=True):
        write(given_files.folder / f"text_emb/text_emb_{number}.npy", part)
    (given_files.folder / "text_emb/.text_emb_0.npy").write_text("left by an editor")
    given_files.run(text_features=given_files.folder / "text_emb")
    with FeatureStore(given_files.path) as store:
        np.testing.assert_array_equal(store.text_features[:], given_files.texts[[3, 4, 1, 2, 0]])


def test_what_clip_retrieval_writes(given_files, tmp_path):
    images, texts = numbers(5, 4, dtype=np.float16), numbers(5, 4, seed=1, dtype=np.float16)
    names = [f"{row:09d}.jpg" for row in range(5)]
    for number, rows in enumerate((slice(0, 2), slice(2, 5))):
        write(tmp_path / f"img_emb/img_emb_{number}.npy", images[rows])
        write(tmp_path / f"text_emb/text_emb_{number}.npy", texts[rows])
        metadata = [(name, None if name.endswith("1.jpg") else "a dog") for name in names[rows]]
        table(tmp_path / f"metadata/metadata_{number}.parquet", metadata, ("image_path", "caption"))
    folders = {"image_features": tmp_path / "img_emb", "text_features": tmp_path / "text_emb"}
    given_files.run(**folders, captions=tmp_path / "metadata")
    assert "split by image with seed 0" in given_files.said[1]
    with FeatureStore(given_files.path) as store:
        assert store.image_ids == [names[row] for row in (0, 2, 3, 4)]
        np.testing.assert_array_equal(store.image_features[:, 0], images[[0, 2, 3, 4]])
        np.testing.assert_array_equal(store.text_features[:], texts[[0, 2, 3, 4]])
        assert store.provenance["image"]["encoder"] == "import:img_emb"
        assert [failure.reason for failure in store.failures] == ["empty caption: ''", "no usable caption"]


def test_the_rows_of_a_picture_that_comes_several_times_have_to_be_equal_up_to_rounding(given_files):
    paired = given_files.images[[0, 1, 0, 2, 1]]
    given_files.run(image_features=write(given_files.folder / "paired.npy", paired))
    with FeatureStore(given_files.path) as store:
        np.testing.assert_array_equal(store.image_features[:, 0], given_files.images)
    given_files.path.unlink()
    paired[4, 3] = np.nextafter(paired[4, 3], 9)  # as another batch may have made it
    given_files.run(image_features=write(given_files.folder / "rounded.npy", paired))
    with FeatureStore(given_files.path) as store:
        np.testing.assert_array_equal(store.image_features[:, 0], given_files.images)
    given_files.path.unlink()
    paired[4] += 0.05 * np.linalg.norm(paired[4])
    file = write(given_files.folder / "paired.npy", paired)
    assert refusal(given_files, image_features=file) == (
        f"{file}: rows of the image a.jpg differ; give one row for each different image"
    )


def test_image_ids_name_the_rows_and_may_have_no_captions(given_files):
    file, ids = write(given_files.folder / "many.npy", numbers(4, 4)), given_files.folder / "ids.txt"
    ids.write_text("alone.jpg\na.jpg\nb.jpg\nother.jpg\n")
    given_files.run(image_features=file, image_ids=ids)
    with FeatureStore(given_files.path) as store:
        assert store.image_ids == ["alone.jpg", "a.jpg", "b.jpg", "other.jpg"]
        assert store.image_splits == ["", "train", "train", ""]
        assert store.image_index.tolist() == [2, 1, 2, 1]
        np.testing.assert_array_equal(store.image_features[:, 0], numbers(4, 4))
        np.testing.assert_array_equal(store.text_features[:], given_files.texts[[0, 1, 2, 4]])
        assert store.failures == [Failure("c.jpg", "dataset", "not among the image ids: 'caption 3'")]
        assert store.verify() == []


def test_an_unusable_row_goes_into_the_ledger_and_takes_its_features_along(given_files):
    rows = [("b.jpg", " ", ""), ("a.jpg", "one", ""), ("b.jpg", "two", ""), ("c.jpg", "", ""), (" ", "three", "")]
    given_files.run(captions=table(given_files.folder / "holes.csv", rows))
    with FeatureStore(given_files.path) as store:
        assert store.image_ids == ["b.jpg", "a.jpg"]  # in the order of their first rows, usable or not
        np.testing.assert_array_equal(store.image_features[:, 0], given_files.images[:2])
        np.testing.assert_array_equal(store.text_features[:], given_files.texts[[1, 2]])
        assert store.image_index.tolist() == [1, 0]
        assert [failure[:3] for failure in store.failures] == [
            ("b.jpg", "caption", "empty caption: ''"),
            ("c.jpg", "caption", "empty caption: ''"),
            ("row 5", "dataset", "no picture is named: 'three'"),
            ("c.jpg", "dataset", "no usable caption"),
        ]


def test_the_split_is_the_one_that_an_extraction_makes(given_files, tmp_path):
    names = [f"{number}.jpg" for number in range(30)]
    rows = [(name, "a dog") for name in names]
    given_files.run(
        image_features=write(tmp_path / "i.npy", numbers(30, 2)),
        text_features=write(tmp_path / "t.npy", numbers(30, 2)),
        captions=table(tmp_path / "all.csv", rows, ("image", "caption")),
    )
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with FeatureStore(given_files.path) as store:
        assert store.image_splits == read_dataset(tmp_path / "all.csv").splits
        assert len(set(store.image_splits)) == 3


def test_rows_of_zeros_are_kept_and_mentioned(given_files):
    given_files.texts[[1, 3]] = 0
    given_files.run(text_features=write(given_files.text_features, given_files.texts))
    assert "features that are zeros alone: 0 images, 2 captions; evaluate refuses" in given_files.said[-1]


def test_one_tensor_of_several(given_files):
    file = given_files.folder / "both.safetensors"
    save_file({"image": given_files.images, "text": given_files.texts}, file)
    given_files.run(image_features=Path(f"{file}:image"), text_features=Path(f"{file}:text"))
    with FeatureStore(given_files.path) as store:
        np.testing.assert_array_equal(store.text_features[:], given_files.texts)
        assert store.provenance["image"]["encoder"] == "import:both"
    message = refusal(given_files, image_features=file)
    assert message == f"{file} holds the tensors image (3, 4), text (5, 6); name one of them: {file}:NAME"
    assert "holds the tensors image (3, 4), text" in refusal(given_files, image_features=Path(f"{file}:none"))


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("how", ["object array", "pickle", "npz"])
def test_trap_nothing_is_unpickled(given_files, how):
    file, witness = given_files.folder / "bomb.npy", given_files.folder / "witness"
    if how == "object array":
        write(file, np.array([[Bomb(witness)]], dtype=object))
    elif how == "pickle":
        file.write_bytes(pickle.dumps(Bomb(witness)))
    else:
        np.savez(file.with_suffix(".npz"), a=np.array([[Bomb(witness)]], dtype=object))
        file.with_suffix(".npz").rename(file)
    reason = refusal(given_files, image_features=file)
    assert f"{file} is damaged, or not what its name says (" in reason
    assert (how == "object array") == ("save numbers: numpy.save('x.npy', numpy.stack(list(ARRAY))" in reason)
    assert not witness.exists()


def change(array, place, value):
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("x.npy", np.ones((3, 4), int), "x.npy holds int64; features are float16, float32 or float64"),
        ("x.safetensors", np.ones((3, 4), np.uint8), "x.safetensors holds U8; features are float16"),
        ("x.parquet", np.ones((3, 4), np.int32), "x.parquet holds int32; features are float16"),
        ("x.npy", np.ones(3), "x.npy has the shape (3,); (rows, numbers) or (rows, views, numbers) is needed"),
        ("x.npy", np.ones((3, 0)), "x.npy has the shape (3, 0)"),
        ("x.npy", np.ones((0, 4)), "x.npy holds no rows"),
        ("x.npy", change(numbers(3, 4), (1, 2), np.nan), "x.npy: row 1 (counted from 0) is not finite as float32"),
        ("x.npy", np.full((3, 4), 1e300), "x.npy: row 0 (counted from 0) is not finite as float32"),
        ("x.parquet", change(numbers(3, 4), (2, 0), np.inf), "x.parquet: row 2 (counted from 0) is not finite"),
        ("x.npy", np.ones((4, 4)), "x.npy has 4 rows, and {table} has 5 rows with 3 different images; give"),
    ],
    ids=lambda value: None if isinstance(value, np.ndarray) else str(value),
)
def test_image_features_that_are_refused(given_files, file, array, message):
    file = write(given_files.folder / file, array)
    found = refusal(given_files, image_features=file)
    assert message.format(table=given_files.captions) in found


def test_text_features_that_are_refused(given_files):
    def message(array):
        return refusal(given_files, text_features=write(given_files.folder / "x.npy", array))

    assert message(numbers(5, 2, 3)).endswith("x.npy has the shape (5, 2, 3); (rows, numbers) is needed")
    assert message(numbers(4, 6)).endswith(f"x.npy has 4 rows, and {given_files.captions} has 5; each caption has one")
    later = np.concatenate([numbers(2, 3), change(numbers(3, 3), (2, 0), np.nan)])
    for number, part in enumerate(np.split(later, [2])):
        file = write(given_files.folder / f"parts/{number}.npy", part)
    with patch.object(arrays, "BLOCK", 2):
        found = refusal(given_files, text_features=file.parent)
    assert found == f"{file}: row 2 (counted from 0) is not finite as float32"  # of its own file


def test_paths_that_hold_no_features(given_files, tmp_path):
    def message(file):
        return refusal(given_files, image_features=file)

    formats = ".npy, .npz, .h5, .hdf5, .safetensors, .parquet"
    none, folder = tmp_path / "none", tmp_path / "folder"
    assert message(none) == f"{none} does not exist; name a file ({formats}), or a folder of such files"
    odd = table(tmp_path / "odd.csv")
    assert message(odd) == f"{odd} is of no known format; name a file of one of these: {formats}"
    folder.mkdir()
    assert message(folder).startswith(f"{folder} holds no such files; name a folder with files of one of")
    write(folder / "a.npy", numbers(1, 4))
    write(folder / "b.safetensors", numbers(2, 4))
    assert message(folder).startswith(f"{folder} holds files of several formats (.npy, .safetensors)")
    (folder / "b.safetensors").unlink()
    write(folder / "b.npy", numbers(2, 5))
    assert message(folder) == (
        f"{folder}/b.npy has rows of the shape (5,), float32, and {folder}/a.npy has (4,), float32; "
        "all files of a folder need the same"
    )
    for suffix in (".npy", ".safetensors", ".parquet"):
        whole = write(tmp_path / f"cut{suffix}", numbers(3, 4))
        whole.write_bytes(whole.read_bytes()[:-9])
        assert f"{whole} is damaged, or not what its name says (" in message(whole)


def test_parquet_columns_that_are_no_features(given_files, tmp_path):
    def message(**columns):
        parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
        return refusal(given_files, image_features=tmp_path / "x.parquet")

    assert "x.parquet has no column of such lists; features are a list of" in message(a=[1.0, 2.0], b=["x", "y"])
    lists = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert "x.parquet has several columns of lists of numbers (a, b)" in message(a=lists, b=lists)
    assert "row 1 (counted from 0) has not 2 numbers" in message(a=[*lists[:1], [1.0], *lists[:1]])
    assert "row 2 (counted from 0) has not 2 numbers" in message(a=[*lists[:2], None])
    assert "row 2 (counted from 0) is not finite" in message(a=[*lists[:2], [1.0, None]])
    assert "has the shape (3, 0)" in message(a=pa.array([None, *lists[:2]]))
    parquet.write_table(pa.table({"other": lists, "embedding": lists}), tmp_path / "x.parquet")
    given_files.run(image_features=tmp_path / "x.parquet")


def test_tables_that_are_refused(given_files, tmp_path):
    def message(file):
        return refusal(given_files, captions=file)

    assert "x.parquet has no column that is known to name the images; it has `thing`, `caption`: say" in message(
        table(tmp_path / "x.parquet", [("a", "b")], ("thing", "caption"))
    )
    assert message(table(tmp_path / "x.parquet", [(b"\xff\xd8", "b")], ("image", "caption"))).endswith(
        "x.parquet: the column image holds binary; text is needed"
    )
    assert "x.csv has no column that is known to name the images; it has `a`, `b`, `c`" in message(
        table(tmp_path / "x.csv", ROWS, ("a", "b", "c"))
    )
    twice = [*ROWS[:4], ("a.jpg", "again", "test")]
    assert "a.jpg is in two splits ('train', 'test')" in message(table(tmp_path / "x.csv", twice))
    odd = [*ROWS[:4], ("a.jpg", "again", "holdout")]
    assert "a.jpg has the split 'holdout'; use train, dev or test" in message(table(tmp_path / "x.csv", odd))
    empty = [(name, "", "") for name in PICTURES]
    assert "x.csv holds no usable caption; the first reason: b.jpg: empty caption" in message(
        table(tmp_path / "x.csv", empty)
    )
    assert "none.csv does not exist; name a file (.csv, .tsv, " in message(tmp_path / "none.csv")
    with pytest.raises(DatasetError, match=r"x\.parquet has no column 'picture'; it has `image`, `caption`"):
        read_rows(tmp_path / "x.parquet", ReadOptions("picture"))
    (tmp_path / "x.parquet").unlink()
    assert f"{tmp_path} holds no such files" in message(tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("a.jpg\nb.jpg\n", "image.npy has 3 rows, and {file} has 2 ids"),
        ("a.jpg\n\nc.jpg\n", "{file}, line 2: there is no usable id; write one a line"),
        ("a.jpg\nb.jpg\na.jpg", "{file}, line 3: a.jpg stands in line 1 too; an id has one row"),
        ("x\ny\nz\n", "holds no usable caption; the first reason: b.jpg: not among the image ids"),
    ],
)
def test_image_ids_that_are_refused(given_files, ids, message):
    file = given_files.folder / "ids.txt"
    file.write_text(ids)
    assert message.format(file=file) in refusal(given_files, image_ids=file)


def test_a_store_that_is_there_is_kept_unless_told_otherwise(given_files, run, fails):
    features = ("--image-features", given_files.image_features, "--text-features", given_files.text_features)
    command = ("import", *features, "--captions", given_files.captions, "--store", given_files.path)
    done = run(*command)
    assert "3 images, 5 captions" in done.stderr.splitlines()
    assert done.stderr.splitlines()[-2:] == [
        f"wrote {given_files.path}", f"next: onceover fit --store {given_files.path} --run runs/first",
    ]  # fmt: skip
    before = given_files.path.read_bytes()
    assert f"{given_files.path} is up to date; nothing to import" in run(*command, "--force").stderr
    write(given_files.image_features, numbers(3, 4, seed=5))
    assert run(*command, code=1).stderr.splitlines()[-1] == (
        f"error: {given_files.path} holds other features or captions; name another --store, or use --force"
    )
    assert given_files.path.read_bytes() == before
    run(*command, "--force")
    with FeatureStore(given_files.path) as store:
        np.testing.assert_array_equal(store.image_features[:, 0], numbers(3, 4, seed=5))
    assert "holds something else than a feature store" in fails(*command[:-1], given_files.folder)
    assert not list(given_files.folder.glob(".*.aside*"))


def test_a_full_disk_is_noticed_before_anything_is_written(given_files, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2**30))
    check_disk(given_files.path, 2**30)
    with pytest.raises(FileError) as error:
        check_disk(given_files.folder / "none/s.h5", 3 * 2**30)
    assert str(error.value) == (
        f"{given_files.folder}/none/s.h5 needs about 3.00 GiB, and {given_files.folder} has 1.00 GiB free; "
        "make room, or name a place elsewhere"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=100))
    with pytest.raises(FileError, match="needs about 0.00 GiB"):
        given_files.run()
    assert not given_files.path.exists()


def test_parquet_without_pyarrow_names_what_to_install(given_files, monkeypatch):
    file = write(given_files.folder / "x.parquet", given_files.images)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("image_features", "captions"):
        assert refusal(given_files, **{name: file}) == (
            "Parquet needs the package pyarrow (import of pyarrow halted; None in sys.modules); "
            "pip install 'onceover-retrieval[parquet]'"
        )
    given_files.run()


def test_arrays_of_another_byte_order_or_layout(tmp_path):
    array = numbers(7, 3)
    for odd in (array.astype(">f4"), np.asfortranarray(array)):
        opened = open_array(write(tmp_path / "x.npy", odd), (2,))
        assert (opened.shape, opened.dtype) == ((7, 3), "float32")
        ((_, block),) = opened.blocks("reading")
        assert block.dtype == np.float32
        np.testing.assert_array_equal(block, array)


def test_there_is_no_encoder_behind_imported_features():
    with pytest.raises(EncoderError, match=f"^import:x: {NO_ENCODER}"):
        parse_spec("import:x")
    with pytest.raises(EncoderError, match="is no encoder specification"):
        parse_spec("import:")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_imported_store_is_fitted_evaluated_drawn_indexed_and_described(
    run, fails, drawn, tmp_path, one_format, dtype
):
    splits = ["train"] * 60 + ["dev"] * 10 + ["test"] * 10
    images = np.abs(numbers(81, 2, 8))  # the last one without captions
    texts = np.repeat(images[:80].mean(1) @ numbers(8, 6, seed=1), 2, axis=0) + 0.1 * numbers(160, 6, seed=2)
    write(tmp_path / "i.npy", images.astype(dtype))
    write(tmp_path / "t.npy", texts.astype(dtype))
    table(tmp_path / "t.csv", [(f"{row // 2}.jpg", f"caption {row}", splits[row // 2]) for row in range(160)])
    (tmp_path / "ids.txt").write_text("".join(f"{row}.jpg\n" for row in range(81)))
    store, folder, cpu = tmp_path / "s.h5", tmp_path / "r", ("--device", "cpu")
    arrays_given = ("--image-features", tmp_path / "i.npy", "--text-features", tmp_path / "t.npy")
    table_given = ("--captions", tmp_path / "t.csv", "--image-ids", tmp_path / "ids.txt")
    run("import", *arrays_given, *table_given, "--store", store, "--name", "mine")
    assert f"{store} is sound" in run("verify", store).stdout
    about = run("info", store).stdout
    assert f"import:mine, 81 x 2 x 8 {np.dtype(dtype).name}" in about
    assert f"imported from {tmp_path / 'i.npy'}" in about
    small = (
        "--set",
        "model.embedding_dim=8",
        "--set",
        "model.dropout=0",
        "--set",
        "training.num_epochs=40",
        "--set",
        "training.batch_size=30",
    )
    run("fit", "--store", store, "--run", folder, *small, *cpu)
    result = json.loads(run("evaluate", "--run", folder, "--json").stdout)
    models = result["models"]
    assert (result["n_images"], result["n_captions"]) == (10, 20)
    assert models["multimodal"]["rsum"] > models["chance"]["rsum"]
    assert models["cca"]["rsum"] > 1.5 * models["chance"]["rsum"]
    assert "zero_shot" not in models
    assert "import:mine" in run("info", folder).stdout
    run("plot", "--store", store, "--out", tmp_path / "figures")
    assert "81 images: 81 added" in run("index", "--run", folder).stderr
    assert fails("search", "--run", folder, "--query", "a dog", *cpu).startswith(f"import:mine: {NO_ENCODER}")
    picture = ("--query", drawn / "query.jpg", "--mode", "image2text")
    assert fails("search", "--run", folder, *picture, *cpu).startswith(f"import:mine: {NO_ENCODER}")
    assert fails("verify", store, "--sample", 2, *cpu).startswith(f"import:mine: {NO_ENCODER}")
    index = ("index", "--run", folder, "--images", drawn / "images", "--index", tmp_path / "x")
    assert f"error: import:mine: {NO_ENCODER}" in run(*index, *cpu, code=1).stderr


def test_an_extraction_does_not_touch_an_imported_store(run, given_files, drawn, extract_config):
    given_files.run()
    before = given_files.path.read_bytes()
    specs = ("--image-encoder", extract_config.image_encoder, "--text-encoder", extract_config.text_encoder)
    command = ("extract", "--data", drawn, "--store", given_files.path, *specs, "--device", "cpu")
    assert "holds other image features (they differ in: architecture" in run(*command, code=1).stderr
    assert given_files.path.read_bytes() == before


def npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4"),
        npy(b"\xff\xfe\x00garbage"),
        npy(b"((((((((" * 1000),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 4), }\n"),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9" + b"9" * 30 + b", 4), }\n"),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 4), }\n", b"\0" * 48),
        npy(b"{'descr': 'nothing', 'fortran_order': False, 'shape': (3, 4), }\n", b"\0" * 48),
        npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 4), }\n", b"\0" * 48),
    ],
    ids=lambda data: f"{data[:70]!r}",
)
def test_trap_a_damaged_npy_is_one_line(given_files, data):
    file = given_files.folder / "x.npy"
    file.write_bytes(data)
    found = refusal(given_files, image_features=file)
    assert found.startswith(f"{file} is damaged, or not what its name says (")
    assert found.isprintable()


def test_trap_an_npy_that_holds_more_than_it_says_is_refused(given_files):
    file = given_files.folder / "x.npy"
    whole = write(file, given_files.images).read_bytes()
    file.write_bytes(whole + b"\0" * 16)
    assert refusal(given_files, image_features=file) == (
        f"{file} has {len(whole) + 16} bytes; its shape (3, 4) needs {len(whole)}"
    )


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_trap_bytes_that_are_flipped_or_cut_off_are_one_line(given_files, suffix):
    file = write(given_files.folder / f"x{suffix}", given_files.images)
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(whole[: random.integers(len(whole))] if random.random() < 0.3 else whole)
        for place in random.integers(max(len(changed), 1), size=3) if changed else ():
            changed[place] = random.integers(256)
        file.write_bytes(changed)
        try:
            for _ in open_array(file, (2,)).blocks("reading"):
                pass
        except OnceoverError as error:
            assert str(error).startswith(str(file))
            assert "\n" not in str(error)
            assert len(str(error)) < 600


def test_trap_special_files_are_not_waited_for(given_files):
    for suffix in (".npy", ".safetensors", ".parquet"):
        fifo = given_files.folder / f"fifo{suffix}"
        os.mkfifo(fifo)
        assert refusal(given_files, text_features=fifo) == f"{fifo} is a FIFO; a regular file is needed"
    assert refusal(given_files, captions=fifo) == f"{fifo} is a FIFO; a regular file is needed"
    folder = given_files.folder / "parts"
    (folder / "1.npy").mkdir(parents=True)
    assert refusal(given_files, text_features=folder) == f"{folder / '1.npy'} is a folder; a regular file is needed"


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".pt", "is not read; convert it: numpy.save('x.npy', torch.load(FILE, weights_only=True).numpy())"),
        (".PTH", "is not read; convert it: numpy.save('x.npy', torch.load(FILE, weights_only=True).numpy())"),
        (".pkl", "is a pickle, which can run code and is not read; where it was made: numpy.save("),
        (".mat", "is not read; convert it: numpy.save('x.npy', scipy.io.loadmat(FILE)['NAME'])"),
    ],
)
def test_other_formats_are_refused_with_their_conversion(given_files, suffix, message):
    file = given_files.folder / f"x{suffix}"
    file.write_bytes(b"x")
    assert refusal(given_files, image_features=file).startswith(f"{file} {message}")


def test_trap_regions_of_an_image_are_no_views(given_files):
    file = write(given_files.folder / "x.npy", numbers(3, 36, 4))
    assert refusal(given_files, image_features=file) == (
        f"{file} has 36 rows per image, more than the 12 views that there are; "
        "if they are regions of it, --regions mean takes their mean"
    )
    given_files.run(image_features=write(file, numbers(3, 12, 4)))
    assert refusal(given_files, image_features=write(file, numbers(3, 4)), regions="mean") == (
        f"{file} has the shape (3, 4), and no regions whose mean could be taken"
    )


def test_regions_are_taken_together_by_their_mean_alone(given_files):
    file = write(given_files.folder / "x.npy", numbers(3, 36, 4))
    assert "by their mean, not by 'max'" in refusal(given_files, image_features=file, regions="max")


def test_the_mean_of_regions_is_taken_where_it_is_asked_for(given_files):
    regions = numbers(3, 36, 4, dtype=np.float16)
    given_files.run(image_features=write(given_files.folder / "x.npy", regions), regions="mean")
    with FeatureStore(given_files.path) as store:
        assert store.image_features.dtype == np.float16
        expected = regions.mean(1, dtype=np.float32).astype(np.float16)
        np.testing.assert_array_equal(store.image_features[:, 0], expected)


def archive(file: Path, arrays_by_name: dict[str, np.ndarray]) -> Path:
    """A file with several arrays: .npz, .h5 or .safetensors."""
    if file.suffix == ".npz":
        np.savez_compressed(file, **arrays_by_name)
    elif file.suffix == ".safetensors":
        save_file(arrays_by_name, file)
    else:
        with h5py.File(file, "w") as opened:
            for name, array in arrays_by_name.items():
                opened.create_dataset(name, data=array, compression="gzip")
    return file


ARCHIVES = pytest.mark.parametrize("suffix", [".npz", ".h5", ".hdf5", ".safetensors"])


@ARCHIVES
def test_one_array_of_an_archive_is_the_only_one_or_the_one_that_is_named(given_files, suffix):
    alone = archive(given_files.folder / f"alone{suffix}", {"anything": given_files.images})
    both = archive(given_files.folder / f"both{suffix}", {"image": given_files.images, "text": given_files.texts})
    with patch.object(store_module, "BLOCK", 2):
        given_files.run(image_features=alone, text_features=Path(f"{both}:text"))
    with FeatureStore(given_files.path) as store:
        np.testing.assert_array_equal(store.image_features[:, 0], given_files.images)
        np.testing.assert_array_equal(store.text_features[:], given_files.texts)
    assert "image (3, 4), text (5, 6); name one of them: " in refusal(given_files, text_features=both)


@ARCHIVES
@pytest.mark.parametrize("views", [None, 2])
def test_an_array_for_each_image_by_its_name(given_files, suffix, views):
    rows = numbers(3, *([views] if views else []), 4, dtype=np.float16)
    by_name = dict(zip(["c", "a", "b"], rows, strict=True))
    file = archive(given_files.folder / f"named{suffix}", by_name)
    with patch.object(arrays, "BLOCK", 2):
        given_files.run(image_features=file)
    with FeatureStore(given_files.path) as store:
        assert sorted(store.image_ids) == ["a.jpg", "b.jpg", "c.jpg"]  # as the table writes them
        for row, name in enumerate(store.image_ids):
            np.testing.assert_array_equal(store.image_features[row].reshape(by_name[name[0]].shape), by_name[name[0]])
        assert [store.image_ids[row] for row in store.image_index] == PICTURES
        assert store.verify() == []


def test_named_arrays_that_fit_no_table_are_refused(given_files):
    def message(**by_name):
        return refusal(given_files, image_features=archive(given_files.folder / "named.npz", by_name))

    row = numbers(4)
    assert "has an image of none of these names (the first: x); name one array" in message(x=row, y=row)
    assert "holds the arrays a (4,), b (5,); name one of them" in message(a=row, b=numbers(5))
    assert message(**{"a": row, "a.jpg": row, "b": row}).endswith(
        f"has two arrays for an image of {given_files.captions}; an image has one row"
    )
    assert "has the shape (3,)" in message(a=numbers(3))
    file = given_files.folder / "objects.npz"
    np.savez(file, a=np.array([Bomb(given_files.folder / "witness")], dtype=object))
    assert "a.npy holds Python objects, which are not read" in refusal(given_files, image_features=file)
    with h5py.File(given_files.folder / "link.h5", "w") as opened:
        opened["a"] = h5py.ExternalLink("elsewhere.h5", "a")
    assert "is a link; it is not read" in refusal(given_files, image_features=given_files.folder / "link.h5")


@pytest.mark.parametrize("repeated", [False, True])
def test_plain_captions_so_many_for_each_image(given_files, repeated):
    images = numbers(4, 4)
    lines = given_files.folder / "train_caps.txt"
    lines.write_text("".join(f"caption {number}\n" for number in range(12)))
    file = write(given_files.folder / "train_ims.npy", np.repeat(images, 3, axis=0) if repeated else images)
    texts = write(given_files.folder / "texts.npy", numbers(12, 6))
    plain = {"image_features": file, "text_features": texts, "captions": lines}
    given_files.run(**plain, captions_per_image=3)
    with FeatureStore(given_files.path) as store:
        np.testing.assert_array_equal(store.image_features[:, 0], images)
        assert store.image_ids == [f"train_ims-{number:06d}" for number in range(4)]
        assert store.image_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert store.captions == [f"caption {number}" for number in range(12)]
    rows = 12 if repeated else 4
    assert refusal(given_files, **plain, captions_per_image=5) == (
        f"{file} has {rows} rows, and {lines} has 12 lines, which with 5 captions an image are 2.4 images; give a row "
        "for each image, or for each line"
    )


@pytest.fixture
def precomputed(tmp_path, drawn):
    """The files of three splits, 2 captions an image, with real captions; the train images are repeated."""
    captions = read_dataset(drawn).captions
    folder = tmp_path / "precomp"
    folder.mkdir()
    start = 0
    for split, count in (("train", 40), ("dev", 10), ("test", 10)):
        images = numbers(count, 8, seed=count)
        np.save(folder / f"{split}_ims.npy", np.repeat(images, 2, axis=0) if split == "train" else images)
        lines = captions[start : start + 2 * count]
        (folder / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
        start += 2 * count
    return folder


def test_a_folder_of_precomputed_features_whose_captions_are_encoded(run, fails, precomputed, tiny_bert, tmp_path):
    store, encoder = tmp_path / "s.h5", ("--text-encoder", f"hf:{tiny_bert}")
    command = ("import", "--precomputed", precomputed, "--store", store, "--device", "cpu")
    assert fails(*command).startswith("there are no text features; name them (--text-features), or an encoder for")
    run(*command, *encoder)
    with FeatureStore(store) as opened:
        assert opened.image_splits == ["train"] * 40 + ["dev"] * 10 + ["test"] * 10
        assert opened.image_ids[40] == "dev-000000"
        np.testing.assert_array_equal(opened.image_features[:40, 0], numbers(40, 8, seed=40))
        assert opened.image_index.tolist() == np.repeat(np.arange(60), 2).tolist()
        assert opened.recipes["text"]["layers"] == ["last", 1, "words"]
        assert opened.dims == (8, 96)
        assert opened.verify() == []
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["precomp", "s.h5"]
    assert f"{store} is up to date; nothing to import" in run(*command, *encoder).stderr
    (tmp_path / "s.h5.captions.h5").write_bytes(store.read_bytes())
    assert "is where an import keeps the features of captions" in run(*command, *encoder, code=1).stderr
    assert (tmp_path / "s.h5.captions.h5").read_bytes() == store.read_bytes()
    fitted = ("fit", "--store", store, "--run", tmp_path / "r", "--set", "training.num_epochs=2", "--device", "cpu")
    run(*fitted, "--set", "model.embedding_dim=8")
    said = run("evaluate", "--run", tmp_path / "r").stderr
    assert said.splitlines()[-1].startswith(f"next: onceover search --run {tmp_path}/r --query")
    assert len(run("search", "--run", tmp_path / "r", "--query", "a red circle", "--device", "cpu").stdout) > 0
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle\n")
    index = ("index", "--run", tmp_path / "r", "--captions", captions, "--index", tmp_path / "i", "--device", "cpu")
    assert run(*index).stderr.splitlines()[-1] == f"next: onceover info {tmp_path}/i"  # no encoder for an image


def test_precomputed_files_that_do_not_fit(precomputed, tmp_path, given_files):
    def message():
        return refusal(given_files, **options)

    options = {"image_features": None, "captions": None, "precomputed": precomputed}
    assert "; leave out --image-features, --captions and" in refusal(given_files, precomputed=precomputed)
    (precomputed / "dev_caps.txt").write_text("one\ntwo\nthree\n")
    assert message().startswith(f"{precomputed}/dev_caps.txt has 3 lines, and {precomputed}/dev_ims.npy has 10 rows; ")
    (precomputed / "dev_caps.txt").unlink()
    assert f"{precomputed}/dev_caps.txt" in message()
    for file in precomputed.iterdir():
        file.unlink()
    assert message().startswith(f"{precomputed} holds no precomputed features; it needs train_ims.npy and train_caps")


@pytest.fixture(scope="module")
def of_known_encoders(tmp_path_factory, drawn, tiny_resnet, tiny_bert):
    """Features as another program has them, of a mean of the last layer; and the files that an import takes."""
    import torch

    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder

    folder = tmp_path_factory.mktemp("known")
    dataset = read_dataset(drawn)
    image = ImageEncoder(f"hf:{tiny_resnet}", device="cpu")
    pixels = torch.stack([image.read((drawn / path).read_bytes()) for path in dataset.paths])
    np.save(folder / "images.npy", np.concatenate([image.encode(batch) for batch in pixels.split(8)]))
    np.save(folder / "texts.npy", TextEncoder(f"hf:{tiny_bert}", device="cpu").encode(dataset.captions)[0])
    pairs = zip(dataset.image_index, dataset.captions, strict=True)
    table(folder / "t.csv", [(dataset.paths[image], text, dataset.splits[image]) for image, text in pairs])
    return folder


def given_arrays(folder):
    features = ("--image-features", folder / "images.npy", "--text-features", folder / "texts.npy")
    return (*features, "--captions", folder / "t.csv", "--device", "cpu")


def test_named_encoders_are_checked_and_embed_queries(run, of_known_encoders, drawn, tiny_resnet, tiny_bert, tmp_path):
    store, folder, cpu = tmp_path / "s.h5", tmp_path / "r", ("--device", "cpu")
    encoders = ("--image-encoder", f"hf:{tiny_resnet}", "--text-encoder", f"hf:{tiny_bert}")
    said = run("import", *given_arrays(of_known_encoders), "--data", drawn, "--store", store, *encoders).stderr
    assert f"text: hf:{tiny_bert} gives the features of 32 captions but for 0.00% of their spread (last, mean)" in said
    with FeatureStore(store) as opened:
        np.testing.assert_array_equal(opened.text_features[:], np.load(of_known_encoders / "texts.npy"))
        assert opened.recipes["text"]["architecture"] == "imported"
        assert opened.recipes["text"]["encoder"]["layers"] == ["last"]
        assert opened.provenance["settings"]["text_layers"] == "last"
        paths = opened.image_paths
    assert run("verify", store, "--sample", 8, *cpu).stdout.count("encoded again in float32") == 2
    assert "imported from" in run("info", store).stdout
    run("fit", "--store", store, "--run", folder, "--set", "training.num_epochs=2", *cpu)
    run("search", "--run", folder, "--query", "a red circle", *cpu)
    run("search", "--run", folder, "--query", drawn / paths[0], "--mode", "image2text", *cpu)
    indexed = run("index", "--run", folder, "--images", drawn / "images", "--index", tmp_path / "i", *cpu).stderr
    assert "60 images: 60 added" in indexed
    run("search", "--index", tmp_path / "i", "--query", "a red circle", *cpu)
    tune = ("finetune", "--run", folder, "--data", drawn, "--store", store, "--out", tmp_path / "tuned", *cpu)
    assert f"{store} holds imported features, and fine-tuning needs those that" in run(*tune, code=1).stderr
    joined = tmp_path / "joined.h5"
    half = np.load(of_known_encoders / "images.npy")[..., :5]
    np.save(tmp_path / "half.npy", half)
    other = ("--image-features", tmp_path / "half.npy", "--store", tmp_path / "b.h5")
    run("import", *given_arrays(of_known_encoders), *other)
    run("join", store, tmp_path / "b.h5", "--out", joined)
    with FeatureStore(joined) as opened:
        assert opened.dims == (16 + 5, 64)
        np.testing.assert_array_equal(opened.image_features[:][..., 16:], half)
        assert opened.verify() == []


def test_encoders_that_did_not_make_the_features_are_refused(fails, run, of_known_encoders, tiny_bert, tmp_path):
    def message(texts, *options):
        np.save(tmp_path / "texts.npy", texts)
        others = ("--text-features", tmp_path / "texts.npy", "--store", tmp_path / "s.h5")
        done = run("import", *given_arrays(of_known_encoders), *others, *options, code=1)
        assert not (tmp_path / "s.h5").exists()
        return done.stderr.splitlines()[-1].removeprefix("error: ")

    texts = np.load(of_known_encoders / "texts.npy")
    named = ("--text-encoder", f"hf:{tiny_bert}")
    file = tmp_path / "texts.npy"
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    assert message(unit, *named).startswith(f"hf:{tiny_bert} did not make {file}: 32 captions differ by ")
    assert "mean cosine is 1.0000: they agree in direction, and not in length (1 instead of " in message(unit, *named)
    turned = message(texts[::-1].copy(), *named)
    assert "of the features' spread (at most 0.1 is rounding), their mean cosine is 0." in turned
    assert turned.endswith("; name the encoder that made them, or leave --text-encoder out")
    assert f"did not make {file}: it gives 96 or 32 numbers, and a row has 7; " in message(texts[:, :7].copy(), *named)
    image = ("--image-encoder", "torchvision:shufflenet_v2_x0_5@random")
    assert "the images are needed to check that torchvision:shufflenet_v2_x0_5@random made" in message(texts, *image)


def test_without_an_encoder_nothing_leads_to_a_search(run, of_known_encoders, tmp_path):
    store, folder, cpu = tmp_path / "s.h5", tmp_path / "r", ("--device", "cpu")
    lines = [run("import", *given_arrays(of_known_encoders), "--store", store).stderr]
    lines.append(run("fit", "--store", store, "--run", folder, "--set", "training.num_epochs=1", *cpu).stderr)
    lines.append(run("evaluate", "--run", folder).stderr)
    lines.append(run("index", "--run", folder).stderr)
    following = [said.splitlines()[-1] for said in lines]
    assert following == [
        f"next: onceover fit --store {store} --run runs/first",
        f"next: onceover evaluate --run {folder}",
        f"next: onceover plot --run {folder} --out figures",
        f"next: onceover info {folder}/index",
    ]
