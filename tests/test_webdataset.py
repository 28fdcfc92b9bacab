"""Tar shards as webdataset and img2dataset write them: samples, splits, failures, and tars that are cut or hostile."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from onceover.base.files import FileError
from onceover.extract import tars
from onceover.extract.dataset import DatasetError
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.layouts import images_of, read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore
from onceover.extract.verify import verify_sample


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """Members are (name, content), or a TarInfo without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def sample(key, caption="A dog .", image=None):
    return [(f"{key}.jpg", image or f"image {key}".encode()), (f"{key}.txt", caption)]


def left_out(dataset):
    return [(failure.id, failure.stage, failure.reason) for failure in dataset.failures]


def test_a_folder_of_shards_in_natural_order_with_the_bytes_of_each_image(tmp_path):
    write_tar(tmp_path / "10.tar", sample("000", "Ten ."))
    write_tar(tmp_path / "2.tar", [*sample("000", "Two .\nAnother .\n"), ("000.cls", "3"), *sample("a/001", "Deep .")])
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.ids) == ("webdataset", ["2.tar/000.jpg", "2.tar/a/001.jpg", "10.tar/000.jpg"])
    assert dataset.paths == dataset.ids
    assert dataset.captions == ["Two .", "Another .", "Deep .", "Ten ."]
    assert dataset.image_index.tolist() == [0, 0, 1, 2]
    assert dataset.taken == "webdataset, 2 tars, captions from .txt, one a line: 4 rows"
    assert [dataset.images.open(key) for key in dataset.paths] == [b"image 000", b"image a/001", b"image 000"]
    assert dataset.images.stat("10.tar/000.jpg") == (9, (tmp_path / "10.tar").stat().st_mtime_ns)
    assert dataset.images.describe("10.tar/000.jpg") == f"{tmp_path}/10.tar/000.jpg"
    assert dataset.failures == []


def test_images_of_a_single_tar_are_called_as_in_it(tmp_path):
    (tmp_path / "000.jpg").write_bytes(b"another file of that name")
    path = write_tar(tmp_path / "x.tar", [("./000.jpg", b"in the tar"), ("./000.txt", "A dog .")])
    dataset = read_dataset(path)
    assert (dataset.ids, dataset.paths) == (["000.jpg"], ["x.tar/000.jpg"])
    assert images_of(path, dataset.paths).open("x.tar/000.jpg") == b"in the tar"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x-{000000..000002}.tar", ["x-000000.tar", "x-000001.tar", "x-000002.tar"]),
        ("x-{000002..000001}.tar", ["x-000002.tar", "x-000001.tar"]),
        ("{x,y}-{000000..000001}.tar", ["x-000000.tar", "x-000001.tar", "y-000000.tar", "y-000001.tar"]),
        ("*-000001.tar", ["x-000001.tar", "y-000001.tar"]),
        ("{y,x}-00000?.tar", ["y-000000.tar", "y-000001.tar", "x-000000.tar", "x-000001.tar", "x-000002.tar"]),
        ("[y]-*.tar", ["y-000000.tar", "y-000001.tar"]),
    ],
)
def test_patterns_name_shards(tmp_path, monkeypatch, pattern, names):
    for name in ("x-000000", "x-000001", "x-000002", "y-000000", "y-000001"):
        write_tar(tmp_path / f"shards/{name}.tar", sample("0"))
    expected = [f"{name}/0.jpg" for name in names]
    assert read_dataset(tmp_path / "shards" / pattern).ids == expected
    assert read_dataset(f"{tmp_path}/{{shards,none}}/{pattern}").ids[: len(names)] == [f"shards/{x}" for x in expected]
    monkeypatch.chdir(tmp_path / "shards")
    assert read_dataset(pattern).ids == expected


def test_shards_that_a_pattern_names_and_that_are_not_there(tmp_path):
    write_tar(tmp_path / "1.tar", sample("0"))
    dataset = read_dataset(tmp_path / "{0..2}.tar")
    assert left_out(dataset) == [("0.tar", "dataset", "no such tar"), ("2.tar", "dataset", "no such tar")]
    for pattern in ("{3..9}.tar", "x*.tar"):
        with pytest.raises(DatasetError, match="no file is named by the pattern .*; look at what is in"):
            read_dataset(tmp_path / pattern)
    for pattern in ("{0..99999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(DatasetError, match="at most 1,000,000 are looked for"):
            read_dataset(tmp_path / pattern)
    with pytest.raises(DatasetError, match="does not exist"):
        read_dataset(tmp_path / "9.tar")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-000.tar", "val-000.tar", "x_test_0.tar"], ["train", "dev", "test"]),
        (["train/0.tar", "validation/0.tar"], ["train", "dev"]),
        (["coco_train2014.tar", "coco_val2014.tar"], ["train", "dev"]),
        (["test-0.tar", "test-1.tar"], ["test", "test"]),
    ],
)
def test_splits_by_the_names_of_shards(tmp_path, names, splits):
    for name in names:
        write_tar(tmp_path / name, sample("0"))
    dataset = read_dataset(tmp_path)
    assert (dataset.ids, dataset.splits) == ([f"{name}/0.jpg" for name in names], splits)


@pytest.mark.parametrize(
    "names", [["train-0.tar", "train-1.tar"], ["train-0.tar", "more.tar"], ["train-test.tar", "val.tar"]]
)
def test_names_that_do_not_tell_all_splits_give_a_seeded_split(tmp_path, names):
    for name in names:
        write_tar(tmp_path / name, sample("0"))
    assert read_dataset(tmp_path).notes[0].startswith("no split lists found: split by image with seed 0")


def test_captions_in_json_and_which_text_is_taken(tmp_path):
    members = [
        ("0.jpg", b"x"),
        ("0.json", json.dumps({"caption": "From JSON .", "alt": ["One .", "Two ."], "part": "test"})),
        ("1.jpg", b"x"),
        ("1.json", json.dumps({"caption": "Not this .", "alt": None})),
        ("1.txt", "From the text ."),
        ("2.png", b"x"),
        ("2.json", json.dumps({"sentences": [{"raw": "A cat ."}, {"raw": "A grey cat ."}]})),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    assert read_dataset(path).captions == ["From JSON .", "From the text .", "A cat .", "A grey cat ."]
    dataset = read_dataset(path, options=ReadOptions(caption_columns=("alt",), split_column="part"))
    assert dataset.captions == ["One .", "Two ."]
    assert dataset.splits == ["test"]
    assert dataset.taken.startswith("webdataset, 1 tar, captions from `alt` in .json")
    assert left_out(dataset) == [
        ("1.jpg", "caption", "empty caption: ''"),
        ("1.jpg", "dataset", "no usable caption"),
        ("2.png", "dataset", "picture without captions"),
    ]


def test_what_a_sample_lacks_goes_into_the_ledger(tmp_path, monkeypatch):
    failed = {"key": "6", "status": "failed_to_download", "error_message": "HTTP 404", "caption": "Gone ."}
    members = [
        *sample("0"),
        ("0.seg.png", b"a mask is no image of the sample"),
        ("0.png", b"a second image"),
        ("1.jpg", b"no text"),
        ("2.txt", "No image ."),
        ("3.jpg", b"empty text"),
        ("3.txt", " \n"),
        ("4.jpg", b"not UTF-8"),
        ("4.txt", b"caf\xe9"),
        ("5.jpg", b"broken JSON"),
        ("5.json", "{"),
        ("6.json", json.dumps(failed)),
        ("7.jpg", b"a long text"),
        ("7.txt", "x" * 999),
        ("0.jpg", b"again"),
        ("._0.jpg", b"of macOS"),
        ("notes.md", "hello"),
    ]
    monkeypatch.setattr("onceover.extract.layouts.webdataset.MAX_SIDECAR", 500)
    dataset = read_dataset(write_tar(tmp_path / "x.tar", members))
    assert dataset.ids == ["0.jpg"]
    assert dataset.images.open("x.tar/0.jpg") == b"image 0"
    assert left_out(dataset) == [
        ("0.png", "dataset", "another image of the sample: 0.jpg is taken"),
        ("2.txt", "dataset", "text without an image: 'No image .'"),
        ("3.jpg", "caption", "empty caption: ''"),
        ("4.jpg", "dataset", "its text is not UTF-8"),
        ("5.jpg", "dataset", "its JSON cannot be read"),
        ("6", "dataset", "not downloaded: failed_to_download, HTTP 404: 'Gone .'"),
        ("7.txt", "dataset", "a text too long: 999 bytes; at most 500 are read"),
        ("0.jpg", "dataset", "stands twice in the tar; the first is taken"),
        ("3.jpg", "dataset", "no usable caption"),
        ("1.jpg", "dataset", "picture without captions"),
        ("7.jpg", "dataset", "picture without captions"),
    ]


def entry(name, of, **values):
    info = tarfile.TarInfo(name)
    info.type = of
    for key, value in values.items():
        setattr(info, key, value)
    return info


def test_hostile_members_go_into_the_ledger_and_nothing_is_written(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    folder = tmp_path / "data"
    members = [
        *sample("ok"),
        entry("1.jpg", tarfile.SYMTYPE, linkname="../secret.jpg"),
        entry("2.jpg", tarfile.LNKTYPE, linkname="ok.jpg"),
        entry("3.jpg", tarfile.FIFOTYPE),
        entry("4.jpg", tarfile.CHRTYPE),
        entry("folder.jpg", tarfile.DIRTYPE),
        (f"{tmp_path}/secret.jpg", b"absolute"),
        ("../secret.jpg", b"above"),
        ("a/../../secret.jpg", b"above, too"),
        ("a\\..\\b.jpg", b"of Windows"),
        ("half\udcff.jpg", b"not UTF-8"),
    ]
    dataset = read_dataset(write_tar(folder / "x.tar", members))
    assert dataset.ids == ["ok.jpg"]
    link = "a link within a tar; pack the file itself: tar --dereference --hard-dereference"
    outside = "its path leaves the data folder"
    assert left_out(dataset) == [
        ("1.jpg", "dataset", link),
        ("2.jpg", "dataset", link),
        ("3.jpg", "dataset", "no regular file"),
        ("4.jpg", "dataset", "no regular file"),
        (f"{tmp_path}/secret.jpg", "dataset", outside),
        ("../secret.jpg", "dataset", outside),
        ("../secret.jpg", "dataset", outside),
        ("half\udcff.jpg", "dataset", "a name with half a character"),
        ("b.jpg", "dataset", "picture without captions"),
    ]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "secret.jpg", "x.tar"]
    assert (tmp_path / "secret.jpg").read_bytes() == b"secret"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_gnu_and_pax(tmp_path, form):
    name = "ä/" + "n" * 150
    path = write_tar(tmp_path / "x.tar", [*sample("0"), *sample(name, "Long ."), *sample("1")], form)
    dataset = read_dataset(path)
    assert dataset.ids == ["0.jpg", f"{name}.jpg", "1.jpg"]
    assert [dataset.images.open(key)[:7] for key in dataset.paths] == [b"image 0", b"image \xc3", b"image 1"]


def test_sparse_files_are_skipped_and_what_follows_is_read(tmp_path):
    header = bytearray(entry("0.jpg", tarfile.GNUTYPE_SPARSE, size=512).tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # a header of holes follows
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path = write_tar(tmp_path / "x.tar", sample("1"))
    path.write_bytes(bytes(header) + bytes(512) + b"x" * 512 + path.read_bytes())
    dataset = read_dataset(path)
    assert dataset.ids == ["1.jpg"]
    assert dataset.images.open("x.tar/1.jpg") == b"image 1"
    assert left_out(dataset)[0] == ("0.jpg", "dataset", "a sparse file within a tar; pack it without --sparse")
    pax = entry("2.jpg", tarfile.REGTYPE)
    pax.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    dataset = read_dataset(write_tar(tmp_path / "y.tar", [*sample("1"), pax], tarfile.PAX_FORMAT))
    assert left_out(dataset) == [("2.jpg", "dataset", "a sparse file within a tar; pack it without --sparse")]


def test_a_cut_tar_is_read_as_far_as_it_is_whole_and_says_where_it_ends(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [*sample("0"), ("1.txt", "Cut ."), ("1.jpg", b"x" * 5000)]).read_bytes()
    start = whole.index(b"x" * 5000)

    def failures(size):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        return left_out(read_dataset(tmp_path / "cut.tar"))

    again = "fetch it again"
    assert failures(start + 4999) == [
        ("1.txt", "dataset", "text without an image: 'Cut .'"),
        (
            "cut.tar",
            "dataset",
            f"the tar is cut off: it ends after {start + 4999:,} bytes, within 1.jpg, which needs {start + 5000:,}; "
            "fetch it again",
        ),
    ]
    assert failures(start - 100)[-1] == (
        "cut.tar",
        "dataset",
        f"the tar is cut off: it ends after {start - 100:,} bytes without the end mark of a tar; {again}",
    )
    assert failures(2048) == [
        ("cut.tar", "dataset", f"the tar is cut off: it ends after 2,048 bytes without the end mark of a tar; {again}")
    ]
    (tmp_path / "cut.tar").write_bytes(b"")
    with pytest.raises(DatasetError, match="no image is usable; the first reason: cut.tar: .* after 0 bytes"):
        read_dataset(tmp_path / "cut.tar")


def test_damage_and_joined_tars_are_told(tmp_path):
    one = write_tar(tmp_path / "x.tar", sample("0")).read_bytes()

    def last(content):
        (tmp_path / "x.tar").write_bytes(content)
        return left_out(read_dataset(tmp_path / "x.tar"))[-1][2]

    assert last(one[:2048] + b"\1" * 512 + one[2560:]) == (
        "the tar is damaged: no header at byte 2,048; what follows is not read; fetch it again"
    )
    assert last(one + one) == (
        "the tar goes on after its end mark: what follows byte 2,560 is not read; split joined tars"
    )
    huge = entry("1.jpg", tarfile.REGTYPE, size=2**40).tobuf(tarfile.GNU_FORMAT)
    assert last(one[:2048] + huge) == (
        "the tar is cut off: it ends after 2,560 bytes, within 1.jpg, which needs 1,099,511,630,336; fetch it again"
    )
    back = entry("1.jpg", tarfile.REGTYPE, size=-1024).tobuf(tarfile.GNU_FORMAT)
    assert last(one[:2048] + back + one) == (
        "the tar is damaged: 1.jpg has a negative size; what follows it is not read"
    )
    for of in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        large = entry("h", of, size=2**20 + 1).tobuf()
        assert last(one[:2048] + large + bytes(2**21)).startswith(
            "the tar is damaged: a header of 1,048,577 bytes at byte 2,560"
        )
    for records in (b"99999999999999999999999 path=x\n", b"-5 path=x\n", b"no number\n", b"9 path=x\n\n7 a"):
        broken = entry("h", tarfile.XHDTYPE, size=len(records)).tobuf() + records.ljust(512, b"\0")
        assert (
            last(one[:2048] + broken + one)
            == "the tar is damaged: a broken header at byte 2,560; what follows is not read"
        )
    records = b"17 size=-1000000\n"
    wrong = entry("h", tarfile.XHDTYPE, size=len(records)).tobuf() + records.ljust(512, b"\0") + one
    assert "negative size" in last(one[:2048] + wrong)


def test_packed_tars_are_refused_in_a_line(tmp_path):
    one = write_tar(tmp_path / "x.tar", sample("0")).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(one))
    with pytest.raises(DatasetError, match="x.tar.gz is packed, and only plain tars can be read in place; unpack it"):
        read_dataset(tmp_path / "x.tar.gz")
    (tmp_path / "x.tar").write_bytes(gzip.compress(one))
    for data in (tmp_path / "x.tar", tmp_path / "*.tar"):
        with pytest.raises(DatasetError, match=r"x.tar: the tar is packed \(gzip\), and only plain tars can be read"):
            read_dataset(data)
    (tmp_path / "x.tar").write_bytes(b"GIF89a" * 200)
    with pytest.raises(DatasetError, match="no tar, by its first bytes"):
        read_dataset(tmp_path / "x.tar")


def test_a_folder_whose_first_tars_are_damaged(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(pointer)
    lost = ("1.tar", "dataset", "it is Git's pointer to a large file, not the file: run git lfs pull")
    with pytest.raises(DatasetError, match="0.tar: the tar is cut off"):
        read_dataset(tmp_path)
    write_tar(tmp_path / "2.tar", sample("0"))
    dataset = read_dataset(tmp_path)
    assert (dataset.ids, left_out(dataset)[1]) == (["2.tar/0.jpg"], lost)


def test_images_with_a_dot_in_their_names_go_into_the_ledger(tmp_path):
    members = [*sample("0"), ("2019.05.jpg", b"x"), ("2019.05.txt", b"A dog .")]
    dataset = read_dataset(write_tar(tmp_path / "x.tar", members))
    reason = "its suffix, from the first dot of its name on, is .05.jpg; rename it"
    assert (dataset.ids, left_out(dataset)) == (["0.jpg"], [("2019.05.jpg", "dataset", reason)])


def test_a_folder_of_tars_whose_texts_come_after_many_images(tmp_path):
    images = [(f"{number}.jpg", b"x") for number in range(400)]
    write_tar(tmp_path / "x.tar", [*images, *((f"{number}.txt", b"A dog .") for number in range(400))])
    assert len(read_dataset(tmp_path).ids) == 400


def test_an_archive_of_images_beside_a_table_is_left_alone(tmp_path):
    write_tar(tmp_path / "images.tar", [("images/a.jpg", b"x"), ("images/b.jpg", b"y")])
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,A dog .\n")
    assert read_dataset(tmp_path).layout == "csv"


def listed(path, rows):
    columns = ("key", "caption", "status", "error_message")
    parquet.write_table(pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))), path)


def test_img2datasets_tars_with_the_downloads_that_failed(tmp_path, monkeypatch):
    write_tar(tmp_path / "00000.tar", [*sample("000000000"), ("000000000.json", '{"status": "success"}')])
    rows = [
        ("000000000", "A dog .", "success", None),
        ("000000001", "A cat .", "failed_to_download", "HTTP Error 404: Not Found"),
        ("000000002", "A cow .", "success", None),
    ]
    listed(tmp_path / "00000.parquet", rows)
    (tmp_path / "00000_stats.json").write_text('{"count": 3}')
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.ids) == ("webdataset", ["00000.tar/000000000.jpg"])
    assert left_out(dataset) == [
        (
            "00000.tar/000000001",
            "dataset",
            "not downloaded: failed_to_download, HTTP Error 404: Not Found: 'A cat .'",
        ),
        ("00000.tar/000000002", "dataset", "listed as downloaded, and not there: 'A cow .'"),
    ]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    dataset = read_dataset(tmp_path)
    assert dataset.failures == []
    assert "failed downloads not listed (pip install" in dataset.taken


def _read(images, keys):
    return [images.open(key) for key in keys]


def test_images_are_read_in_threads_forks_and_pickled_copies(tmp_path):
    contents = {f"{number:03}": os.urandom(300) for number in range(40)}
    members = [part for key, content in contents.items() for part in sample(key, image=content)]
    dataset = read_dataset(write_tar(tmp_path / "x.tar", members))
    expected = list(contents.values())
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.images.open, dataset.paths)) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.apply(_read, (dataset.images, dataset.paths)) == expected
    assert _read(pickle.loads(pickle.dumps(dataset.images)), dataset.paths) == expected


def test_a_tar_that_changes_after_it_was_indexed_is_not_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", sample("0"))
    images = read_dataset(path).images
    with pytest.raises(FileNotFoundError, match="no such picture"):
        images.open("x.tar/9.jpg")
    monkeypatch.setattr(tars, "MAX_BYTES", 3)
    with pytest.raises(FileError, match="x.tar/0.jpg has 7 bytes; at most 3 are read"):
        images.open("x.tar/0.jpg")
    write_tar(path, [*sample("1"), *sample("0")])
    os.utime(path, ns=(1, 1))
    monkeypatch.undo()
    with pytest.raises(OSError, match="x.tar was changed or removed since it was first read"):
        images.open("x.tar/0.jpg")


def test_ten_thousand_samples_are_indexed_in_seconds(tmp_path):
    block = b"".join(
        tarfile.TarInfo(f"{number:09}{suffix}").tobuf()
        for number in range(2000)
        for suffix in (".jpg", ".txt", ".json")
    )
    (tmp_path / "x.tar").write_bytes(block + bytes(10240))
    start = time.process_time()
    with (tmp_path / "x.tar").open("rb") as file:
        assert sum(1 for _ in tars.members(file)) == 6000
    assert time.process_time() - start < 2


def test_features_from_tars_are_those_of_the_files(drawn, tmp_path, extract_config):
    folder = tmp_path / "folder"
    folder.mkdir()
    files = sorted(drawn.rglob("*.jpg"))[:6]
    lines = []
    for number, file in enumerate(files):
        shutil.copy2(file, folder / file.name)
        caption = f"A thing {number} ."
        lines.append(f"{file.name},{caption}")
        shard = tmp_path / f"tars/{number // 3}.tar"
        shard.parent.mkdir(exist_ok=True)
        with tarfile.open(shard, "a") as tar:
            tar.add(file, file.name)
            text = tarfile.TarInfo(f"{file.stem}.txt")
            text.size = len(caption)
            tar.addfile(text, io.BytesIO(caption.encode()))
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    extract(read_dataset(tmp_path / "tars"), tmp_path / "tar.h5", extract_config, device="cpu")
    extract(read_dataset(folder), tmp_path / "folder.h5", extract_config, device="cpu")
    with FeatureStore(tmp_path / "tar.h5") as one, FeatureStore(tmp_path / "folder.h5") as other:
        assert one.image_ids == [f"{number // 3}.tar/{file.name}" for number, file in enumerate(files)]
        np.testing.assert_array_equal(one.image_features[:], other.image_features[:])
        np.testing.assert_array_equal(one.text_features[:], other.text_features[:])
        assert verify_sample(one, 4, device="cpu")[1] == []
    assert extract(read_dataset(tmp_path / "tars"), tmp_path / "tar.h5", extract_config, device="cpu").up_to_date
