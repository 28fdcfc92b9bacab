"""Parquet tables with images inside, as Hugging Face's datasets and img2dataset write them, and with images' names."""

import hashlib
import multiprocessing
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from onceover.base.extras import MissingPackageError
from onceover.base.files import FileError
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset import parquet as tables
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore
from onceover.extract.verify import verify_sample

INSIDE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, row_group_size=None, **columns):
    """Images are given as (bytes, path) or None, and stored as datasets stores them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(columns.get("image"), list) and not any(isinstance(value, bytes | str) for value in columns["image"]):
        images = [image and {"bytes": image[0], "path": image[1]} for image in columns["image"]]
        columns["image"] = pa.array(images, INSIDE)
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def left_out(dataset):
    return [(failure.id, failure.stage, failure.reason) for failure in dataset.failures]


def test_shards_of_hugging_faces_datasets_with_their_splits(tmp_path):
    data = tmp_path / "data"
    write(data / "train-00000-of-00002.parquet", image=[(b"A", "a.jpg"), (b"B", "b.jpg")], text=["One .", "Two ."])
    write(data / "train-00001-of-00002.parquet", image=[(b"C", "c.jpg")], text=["Three ."])
    write(data / "validation-00000-of-00001.parquet", image=[(b"D", "d.jpg")], text=["Four ."])
    write(data / "test-00000-of-00001.parquet", image=[(b"E", "e.jpg")], text=["Five ."])
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.ids) == ("parquet", ["e.jpg", "a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    assert dataset.splits == ["test", "train", "train", "train", "dev"]
    assert dataset.paths[:3] == [
        "data/test-00000-of-00001.parquet/0",
        "data/train-00000-of-00002.parquet/0",
        "data/train-00000-of-00002.parquet/1",
    ]
    assert [dataset.images.open(key) for key in dataset.paths] == [b"E", b"A", b"B", b"C", b"D"]
    assert dataset.captions == ["Five .", "One .", "Two .", "Three .", "Four ."]
    assert dataset.taken == "Parquet, 4 files, images in `image`, captions from `text`: 5 rows"
    file = data / "test-00000-of-00001.parquet"
    assert dataset.images.stat(dataset.paths[0]) == (file.stat().st_size, file.stat().st_mtime_ns)
    assert dataset.images.describe(dataset.paths[0]) == f"{file}/0 (e.jpg)"
    assert (dataset.notes, dataset.failures) == ([], [])
    part = read_dataset(data / "{train,validation}-*.parquet")
    assert (part.ids, part.splits) == (["a.jpg", "b.jpg", "c.jpg", "d.jpg"], ["train", "train", "train", "dev"])


def test_lists_of_captions_several_columns_and_a_column_of_splits(tmp_path):
    sentences = [[{"raw": "A dog .", "sentid": 1}, {"raw": "A brown dog .", "sentid": 2}], [{"raw": "A cat ."}]]
    path = write(
        tmp_path / "TEST-00000-of-00001.parquet",
        image=[(b"A", None), (b"B", None)],
        sentences=sentences,
        extra_1=["Third .", None],
        split=["train", "val"],
    )
    dataset = read_dataset(path)
    assert dataset.captions == ["A dog .", "A brown dog .", "A cat ."]
    assert dataset.ids == ["TEST-00000-of-00001.parquet/0", "TEST-00000-of-00001.parquet/1"]
    assert dataset.splits == ["train", "dev"]
    dataset = read_dataset(path, options=ReadOptions(caption_columns=("extra_1", "sentences")))
    assert dataset.captions == ["Third .", "A dog .", "A brown dog .", "A cat ."]
    assert left_out(dataset) == [("TEST-00000-of-00001.parquet/1", "caption", "empty caption: ''")]


def test_plain_bytes_and_which_column_is_taken(tmp_path):
    path = write(tmp_path / "x.parquet", jpg=[b"A", b"B"], mask=[b"-", b"-"], caption=["One .", "Two ."])
    assert [read_dataset(path).images.open(f"x.parquet/{row}") for row in (0, 1)] == [b"A", b"B"]
    write(path, one=[b"A"], two=[b"B"], caption=["One ."])
    with pytest.raises(
        DatasetError, match=r"several columns with bytes \(one, two\); say which .* with --image-column"
    ):
        read_dataset(path)
    assert read_dataset(path, options=ReadOptions(image_column="two")).images.open("x.parquet/0") == b"B"
    write(path, anything=[b"A"], caption=["One ."])
    assert read_dataset(path).images.open("x.parquet/0") == b"A"


def test_ids_that_are_numbers_and_texts_of_all_types(tmp_path):
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    texts = [pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    texts += [pa.string_view()] if hasattr(pa, "string_view") else []
    for of in texts:
        path = write(tmp_path / "x.parquet", image_id=[0, 1], caption=pa.array(["One .", "Two ."]).cast(of))
        dataset = read_dataset(path)
        assert (dataset.paths, dataset.captions) == (["0.jpg", "1.jpg"], ["One .", "Two ."])


def test_bytes_that_are_no_images_are_not_taken_for_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    path = write(tmp_path / "x.parquet", image=["a.jpg"], sha256=[b"\x00" * 32], caption=["One ."])
    assert read_dataset(path).paths == ["a.jpg"]
    path = write(path, id=["a"], blob=[b"\xff\xd8\xff\xe0"], sha256=[b"\x00" * 32], caption=["One ."])
    assert read_dataset(path).taken.startswith("Parquet, 1 file, images in `blob`")


def test_a_column_of_numbers_is_no_column_of_splits_unless_the_user_says_so(tmp_path):
    path = write(tmp_path / "x.parquet", image=[(b"A", "a.jpg")], caption=["One ."], set=[7])
    assert read_dataset(path).captions == ["One ."]
    with pytest.raises(DatasetError, match="the column set holds int64; text is needed"):
        read_dataset(path, options=ReadOptions(split_column="set"))


def test_rows_without_an_image_go_into_the_ledger(tmp_path):
    images = [(b"A", "a.jpg"), None, (None, "c.jpg"), (b"", "d.jpg"), (b"E", "e.jpg")]
    path = write(tmp_path / "x.parquet", 2, image=images, caption=["One .", "Two .", "Three .", "Four .", "Five ."])
    dataset = read_dataset(path)
    assert dataset.ids == ["x.parquet/0", "x.parquet/4"]
    assert left_out(dataset) == [
        ("x.parquet/1", "dataset", "no image in the file: 'Two .'"),
        ("x.parquet/2", "dataset", "no image in the file: only the path c.jpg: 'Three .'"),
        ("x.parquet/3", "dataset", "no image in the file: only the path d.jpg: 'Four .'"),
    ]
    assert [dataset.images.open(key) for key in dataset.paths] == [b"A", b"E"]
    for key in ("x.parquet/5", "x.parquet/-1", "x.parquet/99999999999999999999", "y.parquet/0", "x"):
        assert dataset.images.stat(key) == (-1, -1)
        with pytest.raises(FileNotFoundError, match="no such picture"):
            dataset.images.open(key)


def test_paths_alone_are_looked_for_as_files(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"A")
    write(tmp_path / "x.parquet", image=[(None, "a.jpg"), (None, "b.jpg")], caption=["One .", "Two ."])
    dataset = read_dataset(tmp_path)
    assert (dataset.ids, dataset.paths) == (["a.jpg"], ["images/a.jpg"])
    assert dataset.images.open("images/a.jpg") == b"A"
    assert left_out(dataset) == [("b.jpg", "dataset", "no such picture in images/: 'Two .'")]


def test_rows_of_one_path_are_one_image_where_their_bytes_agree(tmp_path):
    captions = ["One .", "Two .", "Three ."]
    write(tmp_path / "1.parquet", image=[(b"A", "a.jpg"), (b"B", "b.jpg"), (b"A", "a.jpg")], caption=captions)
    dataset = read_dataset(tmp_path)
    assert (dataset.ids, dataset.image_index.tolist()) == (["a.jpg", "b.jpg"], [0, 1, 0])
    write(tmp_path / "2.parquet", image=[(b"other", "a.jpg")], caption=["Four ."])
    dataset = read_dataset(tmp_path)
    assert dataset.ids == ["1.parquet/0", "1.parquet/1", "1.parquet/2", "2.parquet/0"]
    assert dataset.images.open("2.parquet/0") == b"other"


def test_img2datasets_parquet_with_the_downloads_that_failed(tmp_path):
    write(
        tmp_path / "00000.parquet",
        url=["http://a", "http://b"],
        key=["000000000", "000000001"],
        status=["success", "failed_to_download"],
        error_message=[None, "HTTP Error 403: Forbidden"],
        caption=["A dog .", "A cat ."],
        jpg=pa.array([b"A", None], pa.binary()),
    )
    (tmp_path / "00000_stats.json").write_text('{"count": 2}')
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.ids, dataset.captions) == ("parquet", ["00000.parquet/0"], ["A dog ."])
    assert dataset.taken.startswith("Parquet, 1 file, images in `jpg`, captions from `caption`")
    reason = "not downloaded: failed_to_download, HTTP Error 403: Forbidden: 'A cat .'"
    assert left_out(dataset) == [("00000.parquet/1", "dataset", reason)]


def test_tables_that_name_their_images(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    path = write(
        tmp_path / "x.parquet", file_name=["a.jpg", "b.jpg"], title=["One .", "Two ."], subset=["train", "test"]
    )
    dataset = read_dataset(path)
    assert (dataset.ids, dataset.splits) == (["a.jpg", "b.jpg"], ["train", "test"])
    assert dataset.taken.startswith("Parquet, images from `file_name`, captions from `title`, splits from `subset`")
    assert read_dataset(tmp_path).captions == ["One .", "Two ."]
    options = ReadOptions(image_column="title", caption_columns=("file_name",))
    with pytest.raises(DatasetError, match=r"none of the images that .*x.parquet names is there \(the first: One .\)"):
        read_dataset(path, options=options)
    write(path, number=[1.5, 2.5], title=["One .", "Two ."])
    with pytest.raises(DatasetError, match="no column that is known to name the images; it has `number`, `title`"):
        read_dataset(tmp_path)
    with pytest.raises(DatasetError, match="the column number holds double; text is needed"):
        list(read_dataset(path, options=ReadOptions(image_column="number")).ids)
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,From the CSV .\n")
    assert read_dataset(tmp_path).captions == ["From the CSV ."]


def test_what_cannot_be_read_is_told_in_a_line(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", image=[(b"A", "a.jpg")], caption=["One ."])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(DatasetError, match="x.parquet is damaged, or not what its name says"):
        read_dataset(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DatasetError, match="x.parquet: it is Git's pointer to a large file, not the file: run git lfs"):
        read_dataset(path)
    path.write_bytes(whole)
    write(tmp_path / "y.parquet", image=[(b"B", "b.jpg")], other=["Two ."])
    with pytest.raises(DatasetError, match="y.parquet has other columns than x.parquet; name the files of one kind"):
        read_dataset(tmp_path)
    write(path, image=[(b"A", "a.jpg")], caption=[[1.5]])
    with pytest.raises(DatasetError, match=r"the column caption holds list<\w+: double>; text is needed"):
        read_dataset(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingPackageError, match=r"Parquet needs the package pyarrow .*pip install 'onceover-retrieval\[parquet\]'"
    ):
        read_dataset(path)


def test_what_save_to_disk_writes_is_refused_with_how_to_convert_it(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"x")
    for data in (tmp_path, tmp_path / "data-00000-of-00001.arrow"):
        with pytest.raises(
            DatasetError, match=r"was written by save_to_disk .*: datasets.load_from_disk\('.*'\).to_parquet"
        ):
            read_dataset(data)


def _digests(images, keys):
    return [hashlib.sha256(images.open(key)).hexdigest() for key in keys]


@pytest.mark.parametrize("row_group_size", [None, 3])
def test_images_are_read_by_blocks_in_any_order_in_threads_forks_and_copies(tmp_path, monkeypatch, row_group_size):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr("onceover.extract.parquet_images._MOST_BLOCKS", 3)
    random = np.random.default_rng(0)
    contents = [random.bytes(700 + 10 * row) for row in range(40)]
    images = [(content, f"{row}.jpg") for row, content in enumerate(contents)]
    path = write(tmp_path / "x.parquet", row_group_size, image=images, caption=["A dog ."] * 40)
    dataset = read_dataset(path)
    expected = [hashlib.sha256(content).hexdigest() for content in contents]
    assert _digests(dataset.images, dataset.paths) == expected
    assert _digests(dataset.images, dataset.paths[::-1]) == expected[::-1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.images.open, dataset.paths)) == contents
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.apply(_digests, (dataset.images, dataset.paths)) == expected
    assert _digests(pickle.loads(pickle.dumps(dataset.images)), dataset.paths) == expected


def test_a_file_that_changes_or_breaks_after_it_was_read_first(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", image=[(b"A" * 99, "a.jpg")], caption=["One ."])
    images = read_dataset(path).images
    monkeypatch.setattr("onceover.extract.parquet_images.MAX_BYTES", 3)
    with pytest.raises(FileError, match="a.jpg.* has 99 bytes; at most 3 are read"):
        images.open("x.parquet/0")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match="x.parquet was changed or removed since it was first read"):
        images.open("x.parquet/0")


def test_features_from_parquet_are_those_of_the_files(drawn, tmp_path, extract_config):
    folder = tmp_path / "folder"
    folder.mkdir()
    files = sorted(drawn.rglob("*.jpg"))[:6]
    captions = [f"A thing {number} ." for number in range(6)]
    for file in files:
        shutil.copy2(file, folder / file.name)
    lines = [f"{file.name},{caption}" for file, caption in zip(files, captions, strict=True)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    images = [(file.read_bytes(), file.name) for file in files]
    path = write(tmp_path / "x.parquet", 2, image=images, caption=captions)
    extract(read_dataset(path), tmp_path / "parquet.h5", extract_config, device="cpu")
    extract(read_dataset(folder), tmp_path / "folder.h5", extract_config, device="cpu")
    with FeatureStore(tmp_path / "parquet.h5") as one, FeatureStore(tmp_path / "folder.h5") as other:
        assert one.image_ids == other.image_ids
        np.testing.assert_array_equal(one.image_features[:], other.image_features[:])
        np.testing.assert_array_equal(one.text_features[:], other.text_features[:])
        assert verify_sample(one, 4, device="cpu")[1] == []
    assert extract(read_dataset(path), tmp_path / "parquet.h5", extract_config, device="cpu").up_to_date
