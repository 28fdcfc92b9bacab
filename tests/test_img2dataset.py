"""img2dataset's output as files; its tars and its Parquet are in test_webdataset.py and test_parquet_images.py."""

import json
import sys

import pyarrow as pa
from pyarrow import parquet

from onceover.extract.layouts import read_dataset


def shard(folder, name, rows):
    """Rows are (key, caption, status, error); those of success have files."""
    (folder / name).mkdir(parents=True)
    for key, caption, status, _ in rows:
        if status == "success":
            (folder / name / f"{key}.jpg").write_bytes(f"image {key}".encode())
            (folder / name / f"{key}.txt").write_text(caption)
            (folder / name / f"{key}.json").write_text(json.dumps({"key": key, "caption": caption, "status": status}))
    columns = ("key", "caption", "status", "error_message")
    table = pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
    parquet.write_table(table, folder / f"{name}.parquet")
    (folder / f"{name}_stats.json").write_text(json.dumps({"count": len(rows)}))


ROWS = [
    ("000000000", "A dog .", "success", None),
    ("000000001", "A cat .", "failed_to_download", "HTTP Error 404: Not Found"),
    ("000000002", "A cow .", "failed_to_resize", "image decoding error"),
]
MORE = [
    ("000010000", "A bird .", "success", None),
    ("000010001", "A fish .", "success", None),
    ("000010003", "A frog .", "success", None),
]


def left_out(dataset):
    return [(failure.id, failure.stage, failure.reason) for failure in dataset.failures]


def test_folders_of_files_with_the_downloads_that_failed(tmp_path):
    shard(tmp_path, "00000", ROWS)
    shard(tmp_path, "00001", MORE)
    (tmp_path / "00001/000010001.jpg").unlink()
    for suffix in (".jpg", ".txt", ".json"):
        (tmp_path / f"00001/000010003{suffix}").unlink()
    (tmp_path / "00001/000010002.jpg").write_bytes(b"of no row")
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.ids) == ("img2dataset", ["00000/000000000.jpg", "00001/000010000.jpg"])
    assert dataset.captions == ["A dog .", "A bird ."]
    assert [dataset.images.open(key) for key in dataset.paths] == [b"image 000000000", b"image 000010000"]
    assert dataset.taken.startswith("img2dataset, 2 folders: ")
    missing = "not downloaded: failed_to_download, HTTP Error 404: Not Found: 'A cat .'"
    assert left_out(dataset) == [
        ("00001/000010001.txt", "dataset", "text without an image: 'A fish .'"),
        ("00000/000000001", "dataset", missing),
        ("00000/000000002", "dataset", "not downloaded: failed_to_resize, image decoding error: 'A cow .'"),
        ("00001/000010003", "dataset", "listed as downloaded, and not there: 'A frog .'"),
        ("00001/000010002.jpg", "dataset", "picture without captions"),
    ]


def test_without_pyarrow_the_images_are_read_and_that_the_failures_are_not_is_said(tmp_path, monkeypatch):
    shard(tmp_path, "00000", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    dataset = read_dataset(tmp_path)
    assert dataset.ids == ["00000/000000000.jpg"]
    unread = 'failed downloads not listed (pip install "onceover-retrieval[parquet]")'
    assert dataset.taken == f"img2dataset, 1 folder, {unread}: 1 rows"


def test_captions_in_json_where_there_is_no_text(tmp_path):
    shard(tmp_path, "00000", ROWS)
    (tmp_path / "00000.parquet").unlink()
    (tmp_path / "00000/000000000.txt").unlink()
    assert read_dataset(tmp_path).captions == ["A dog ."]


def test_a_folder_of_numbers_alone_is_not_img2datasets(tmp_path):
    shard(tmp_path, "00000", ROWS)
    (tmp_path / "00000.parquet").unlink()
    (tmp_path / "00000_stats.json").unlink()
    assert read_dataset(tmp_path).layout == "text beside"
