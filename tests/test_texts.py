"""Columns of text in little memory, and the index that finds rows by text: like lists and dicts but for the memory."""

import contextlib
import os
import pickle
import resource
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onceover.base import files, hdf5, texts
from onceover.base.files import digest, digest_of_column
from onceover.base.temporary import TemporaryFileError
from onceover.base.texts import ChosenTexts, Texts, text_column
from onceover.extract import key_index, sealing, shards
from onceover.extract.dataset import Dataset
from onceover.extract.key_index import KeyIndex, different_texts, repeated_rows
from onceover.extract.shards import RowSources, write_shard
from onceover.extract.store import FeatureStore

VALUES = st.lists(st.text(st.characters(), max_size=4), max_size=12)  # half characters, NUL and "" among them
ROWS = 256  # of a shard
RECIPE = {"weights": "0" * 64, "pooling": "mean", "layers": ["last"], "dtype": "float32", "store_dtype": "float32"}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows, and files from 64 bytes on, so that few rows make several."""
    monkeypatch.setattr(texts, "_CHUNK", 3)
    monkeypatch.setattr(texts, "IN_MEMORY", 64)
    monkeypatch.setattr(key_index, "IN_MEMORY", 64)


@given(values=VALUES, more=VALUES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_column_reads_like_the_list_that_it_was_made_of(values, more, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_CHUNK", 3)
        patch.setattr(texts, "IN_MEMORY", 20)
        column = Texts(values)
        column.extend(more)
        listed = [*values, *more]
        bounds = st.integers(-30, 30) | st.none()
        chosen = slice(data.draw(bounds), data.draw(bounds), data.draw(bounds.filter(bool)))
        assert (len(column), list(column), bool(column)) == (len(listed), listed, bool(listed))
        assert column == listed
        assert listed == column
        assert column[chosen] == listed[chosen]
        assert pickle.loads(pickle.dumps(column)) == listed
        assert digest_of_column(column) == digest(listed)
        for row in range(-len(listed), len(listed)):
            assert column[row] == column[np.int64(row)] == listed[row]
        with pytest.raises(IndexError):
            column[len(listed)]
        rows = np.array(data.draw(st.lists(st.integers(0, max(0, len(listed) - 1)), max_size=9 * bool(listed))), int)
        picked = ChosenTexts(column, rows)
        assert picked == [listed[row] for row in rows]
        assert picked[chosen] == [listed[row] for row in rows][chosen]


def test_columns_of_other_values_are_not_equal(small_chunks):
    column = Texts(["a", "b", "c", "d"])
    assert column != ["a", "b", "c"]
    assert column != ["a", "b", "c", "e"]
    assert column != "abcd"
    assert text_column(column) is column
    assert repr(Texts(["a", "b"])) == "Texts(['a', 'b'])"


@given(added=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 99)), max_size=20), parts=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_an_index_finds_the_first_and_the_last_number_of_a_key(added, parts):
    index = KeyIndex()
    assert not index
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    size = -(-len(added) // parts) or 1
    for start in range(0, len(added), size):
        block = added[start : start + size]
        index.add([key for key, _ in block], np.array([number for _, number in block]))
        for key, number in block:
            first.setdefault(key, number)
            last[key] = number
        index.first(["a"])  # what is added afterwards joins what is in order already
    assert index.first(list("abcdef")).tolist() == [first.get(key, -1) for key in "abcdef"]
    assert index.last(list("abcdef")).tolist() == [last.get(key, -1) for key in "abcdef"]
    assert index.firsts().tolist() == sorted(first.values())
    assert bool(index) == bool(added)


def test_several_threads_read_a_long_column_and_an_index_at_once(small_chunks):
    values = [f"text {row}" for row in range(300)]
    column = Texts(values)
    index = KeyIndex()
    index.add(values, np.arange(300))

    def read(seed):
        rows = np.random.default_rng(seed).permutation(300)
        return ChosenTexts(column, rows) == [values[row] for row in rows] and (index.first(column[::7]) % 7 == 0).all()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(40)))


def test_a_long_column_closes_its_file_when_nobody_needs_it(small_chunks):
    before = len(list(Path("/proc/self/fd").iterdir()))
    column = Texts(map(str, range(100)))
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del column
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_forks_read_a_long_column_and_an_index_at_once(small_chunks):
    values = [f"text {row}" for row in range(300)]
    column = Texts(values)
    index = KeyIndex()
    index.add(values, np.arange(300))
    children = []
    for seed in range(4):
        child = os.fork()
        if not child:
            rows = np.random.default_rng(seed).permutation(300)
            chosen = ChosenTexts(column, rows)
            os._exit(not (chosen == [values[row] for row in rows] and (index.first(chosen) == rows).all()))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]


@contextlib.contextmanager
def full_disk(size):
    """No file may be longer than ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_trap_a_full_temporary_folder_is_one_error_that_says_what_to_do_and_nothing_is_lost(small_chunks):
    column = Texts(map(str, range(6)))  # is in memory
    with full_disk(100):
        with pytest.raises(TemporaryFileError) as error:
            column.extend(map(str, range(6, 60)))
        with pytest.raises(TemporaryFileError):
            column.extend(["more"])
    assert str(error.value) == (
        f"a temporary file cannot be written in {tempfile.gettempdir()} (File too large); make room there, or name "
        "another folder in the environment variable TMPDIR"
    )
    count = len(column)
    assert 6 < count < 60
    assert column == list(map(str, range(count)))
    column.extend(["more"])
    assert column[-1] == "more"


@pytest.mark.parametrize("size", [0, 1000])
def test_trap_a_full_temporary_folder_stops_an_index_of_keys_with_an_error(small_chunks, size):
    index = KeyIndex()
    with full_disk(size), pytest.raises(TemporaryFileError, match=r"cannot be written in .* \(File too large\); make"):
        index.add(map(str, range(100)), np.arange(100))


def test_different_and_repeated_texts_come_in_their_order():
    values = ["b", "a", "b", "c", "a", "b"]
    assert different_texts(values) == ["b", "a", "c"]
    assert repeated_rows(values) == [[0, 2, 5], [1, 4]]
    assert (different_texts([]), repeated_rows([])) == ([], [])


def test_a_dataset_keeps_its_texts_in_little_memory_and_gives_them_as_they_were():
    dataset = Dataset(None, "csv", ["a", "\udcff"], ["A/a", "A/b"], ["train", ""], ["one", "two"], np.array([0, 1]))
    assert (dataset.ids, dataset.paths, dataset.splits) == (["a", "\udcff"], ["A/a", "A/b"], ["train", ""])
    assert all(isinstance(column, Texts) for column in (dataset.ids, dataset.paths, dataset.splits, dataset.captions))
    assert dataset.first(1).captions == ["one"]
    assert dataset.paths_of({"\udcff", "c"}) == {"\udcff": "A/b"}


def test_sealing_a_folder_takes_little_memory_for_an_image_and_its_caption(tmp_path, monkeypatch):
    """Lists and dicts of strings take 1,200 bytes, columns and digests in memory 300."""
    peaks = []
    monkeypatch.setattr(sealing, "sync_folder", lambda folder: peaks.append(tracemalloc.get_traced_memory()[1]))
    monkeypatch.setattr(texts, "_READ", 1)
    monkeypatch.setattr(texts, "IN_MEMORY", 1000)
    monkeypatch.setattr(key_index, "IN_MEMORY", 1000)
    for module in (sealing, shards):
        monkeypatch.setattr(module, "IN_MEMORY", 1000)
    for module, name in ((sealing, "_GATHERED"), (shards, "_PLACED")):
        monkeypatch.setattr(module, name, ROWS)
    for module, name in ((hdf5, "_TEXTS"), (hdf5, "ROWS"), (files, "_ROWS"), (texts, "_CHUNK"), (key_index, "_BLOCK")):
        monkeypatch.setattr(module, name, ROWS)  # blocks of rows, whose memory does not grow with a store
    for images in (256, 1024, 3072):  # the first: what is loaded at first use stays
        seal_made_up(tmp_path / str(images), images)
    with FeatureStore(tmp_path / "3072" / "s.store") as store:
        assert (len(store.image_ids), store.captions[3071]) == (3072, "image 3071 shows what image 3071 shows")
    assert (peaks[2] - peaks[1]) / 2048 < 50


def seal_made_up(path, images):
    """Seals shards of a made-up dataset as a folder, while the memory of Python is traced from the dataset on."""
    names = [f"{row:07d}.jpg" for row in range(images)]
    contents = [f"{row:064x}" for row in range(images)]
    captions = [f"image {row} shows what image {row} shows" for row in range(images)]
    path.mkdir()
    for start in range(0, images, ROWS):
        rows = slice(start, start + ROWS)
        zeros = np.zeros(ROWS, np.int64)
        columns = {"id": names[rows], "sha256": contents[rows], "size": zeros, "mtime_ns": zeros}
        write_shard(path / f"i{start}", "image", columns | {"features": np.zeros((ROWS, 1, 2), np.float32)}, RECIPE, [])
        columns = {"caption": captions[rows], "truncated": zeros > 0, "features": np.zeros((ROWS, 2), np.float32)}
        columns |= {name: zeros.astype(np.int32) for name in ("unknown", "tokens")}
        write_shard(path / f"t{start}", "text", columns, RECIPE, [])
    stats = np.zeros((images, 2), np.int64)
    tracemalloc.start()
    try:
        dataset = Dataset(path, "csv", names, names, ["train"] * images, captions, np.arange(images))
        sources = {}
        for kind, columns in (("image", ()), ("text", ("truncated",))):
            sources[kind] = RowSources(kind, digest(RECIPE), columns)
            for start in range(0, images, ROWS):
                sources[kind].add(path / f"{kind[0]}{start}")
        positions = sources["image"].find_by_stat(dataset.ids, stats)
        sources["image"].forget_stats()
        sealing.seal(
            path / "s.store",
            images={
                "id": dataset.ids,
                "path": dataset.paths,
                "split": dataset.splits,
                "sha256": ChosenTexts(sources["image"].contents, positions),
                "size": stats[:, 0],
                "mtime_ns": stats[:, 1],
            },
            texts={"caption": dataset.captions, "image_index": dataset.image_index},
            sources=sources,
            recipes={"image": RECIPE, "text": RECIPE},
            provenance={"image": {"encoder": "made up"}, "text": {"encoder": "made up"}},
            failures=[],
            tokenizer_files={},
            form="folder",
        )
    finally:
        tracemalloc.stop()
