"""The HDF5 store: round trips, what it refuses, what verify finds."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onceover.base.errors import OnceoverError
from onceover.base.files import digest, uninterrupted
from onceover.base.hdf5 import memory_mapped, open_hdf5, sign_hdf5, strip_checksum, write_column, write_hdf5
from onceover.extract.ledger import Failure
from onceover.extract.sealing import seal
from onceover.extract.shards import RowSources, write_shard
from onceover.extract.store import Column, FeatureStore, StoreError
from onceover.retrieval.embeddings import read_embeddings

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
RECIPES = {"image": {"weights": "i" * 64, "pooling": "mean"}, "text": {"weights": "t" * 64, "pooling": "mean"}}
MADE = {"encoder": "x", "device": "cpu", "streams": 1, "batch_size": 1, "torch": "0", "transformers": "0"}


def shard_images(path, ids, features, thumbnails=True, recipe=RECIPES["image"], failures=()):
    columns = {"id": ids, "sha256": [f"{name}-bytes" for name in ids], "features": features}
    columns |= {name: np.arange(len(ids), dtype=np.int64) for name in ("size", "mtime_ns")}
    if thumbnails:
        columns["thumbnail"] = [f"jpeg of {name}".encode() for name in ids]
    write_shard(path, "image", columns, recipe, failures)


def write(folder: Path, ids, splits, captions, index, images, texts, failures=(), shards=3) -> Path:
    """A store by way of shards, as the pipeline makes it."""
    bounds = np.linspace(0, len(ids), shards + 1).astype(int)
    sources = {"image": RowSources("image", digest(RECIPES["image"]), ("thumbnail",))}
    sources["text"] = RowSources("text", digest(RECIPES["text"]), ("truncated",))
    for number, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        shard_images(folder / f"image-{number}.h5", ids[start:end], images[start:end])
        sources["image"].add(folder / f"image-{number}.h5")
    unique = list(dict.fromkeys(captions))
    rows = [captions.index(text) for text in unique]
    columns = {"caption": unique, "truncated": np.zeros(len(unique), bool), "features": texts[rows]}
    write_shard(folder / "text-0.h5", "text", columns, RECIPES["text"], [])
    sources["text"].add(folder / "text-0.h5")
    path = folder / "store.h5"
    seal(
        path,
        images={
            "id": ids,
            "path": [f"Images/{name}" for name in ids],
            "split": splits,
            "sha256": [f"{name}-bytes" for name in ids],
            "size": np.arange(len(ids), dtype=np.int64),
            "mtime_ns": np.arange(len(ids), dtype=np.int64),
        },
        texts={"caption": captions, "image_index": np.asarray(index, dtype=np.int64)},
        sources=sources,
        recipes=RECIPES,
        provenance={
            "image": MADE,
            "text": MADE,
            "notes": [],
            "data": "d",
            "layout": "csv",
            "created": "now",
            "settings": {},
        },
        failures=list(failures),
        tokenizer_files={"tokenizer.json": b'{"a": 1}', "vocab.txt": b"\xff\x00"},
    )
    return path


def simple(folder: Path, n=6) -> Path:
    generator = np.random.default_rng(0)
    images, texts = generator.random((n, 2, 3), np.float32), generator.random((2 * n, 4), np.float32)
    ids, captions = [f"{row}.jpg" for row in range(n)], [f"caption {row}" for row in range(2 * n)]
    return write(folder, ids, ["train"] * (n - 2) + ["dev", ""], captions, np.arange(2 * n) // 2, images, texts)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_everything_survives_the_way_through_shards_and_seal(data):
    ids = data.draw(st.lists(TEXT, min_size=1, max_size=12, unique=True))
    splits = data.draw(st.lists(st.sampled_from(["train", "dev", "test", ""]), min_size=len(ids), max_size=len(ids)))
    pool = data.draw(st.lists(TEXT, min_size=1, max_size=8))
    captions = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=20))  # equal captions among them
    index = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=len(captions), max_size=len(captions)))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    images = generator.standard_normal((len(ids), 2, 3)).astype(np.float32)
    by_text = {text: generator.standard_normal(4).astype(np.float32) for text in pool}
    texts = np.stack([by_text[text] for text in captions])
    failures = [Failure(text, "caption", "because", 3, 2**60) for text in pool]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), ids, splits, captions, index, images, texts, failures)
        with FeatureStore(path) as store:
            np.testing.assert_array_equal(store.image_features[:], images)
            np.testing.assert_array_equal(store.text_features[:], texts)
            assert (store.image_ids, store.image_splits, store.captions) == (ids, splits, captions)
            assert store.image_index.tolist() == index
            assert store.failures == failures
            assert list(store.thumbnails()) == [f"jpeg of {name}".encode() for name in ids]
            assert store.tokenizer_files == {"tokenizer.json": b'{"a": 1}', "vocab.txt": b"\xff\x00"}
            assert store.verify() == []


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("image/features", lambda a: a.__setitem__((1, 0, 0), 9.0), "/image/features does not match its checksum"),
        (
            "text/features",
            lambda a: a.__setitem__((1, 0), np.nan),
            "/text/features holds 1 numbers that are not finite",
        ),
        ("text/caption", lambda a: a.__setitem__(0, "another"), "/text/caption does not match its checksum"),
        ("text/image_index", lambda a: a.__setitem__(0, 99), "/text/image_index points outside the images"),
        ("image/id", lambda a: a.__setitem__(0, "1.jpg"), "/image/id: '1.jpg' stands 2 times"),
        ("image/thumbnail", lambda a: a.__setitem__(0, np.zeros(3, np.uint8)), "/image/thumbnail does not match"),
        ("image/split", lambda a: a.__setitem__(0, "test"), "the dataset's fingerprint does not match its rows"),
        ("image/features", lambda a: a.attrs.__setitem__("recipe", "{}"), "the fingerprint is not its recipe's"),
    ],
)
def test_verify_names_each_damage(tmp_path, name, damage, message):
    path = simple(tmp_path)
    with h5py.File(path, "r+") as file:
        damage(file[name])
    strip_checksum(path)
    with FeatureStore(path, check=False) as store:
        assert any(message in problem for problem in store.verify())


def test_verify_sees_a_column_of_another_length(tmp_path):
    path = simple(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["image/size"]
        file["image/size"] = np.zeros(3, np.int64)
    strip_checksum(path)
    with FeatureStore(path, check=False) as store:
        assert "/image/size has 3 rows; 6 expected" in store.verify()


def test_what_is_no_store_is_refused_with_the_way_out(tmp_path):
    def message(path):
        with pytest.raises(OnceoverError) as error:
            FeatureStore(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "make one: onceover extract" in message(tmp_path / "none.h5")
    assert "is a folder" in message(tmp_path)
    (tmp_path / "half.h5.parts").mkdir()
    assert "is unfinished; run the same extract command again" in message(tmp_path / "half.h5")
    (tmp_path / "text.h5").write_text("hello")
    assert "is no HDF5 file" in message(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    assert "no feature store" in message(tmp_path / "other.h5")
    path = simple(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    sign_hdf5(path)
    assert "format version 99; this program reads 3" in message(path)


def test_trap_half_written_caches_are_not_accepted(tmp_path):
    path = simple(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StoreError, match="damaged"):
        FeatureStore(path)


def test_a_failing_seal_leaves_what_was_there(tmp_path):
    path = simple(tmp_path)
    before = path.read_bytes()
    with pytest.raises(LookupError):
        write(
            tmp_path,
            ["a"],
            ["train"],
            ["x"],
            [0],
            np.zeros((1, 1, 1), np.float32),
            np.zeros((1, 1), np.float32),
            shards=0,
        )
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".store*"))


def test_trap_rows_are_found_by_content_and_fingerprint_not_by_name(tmp_path):
    shard_images(tmp_path / "a.h5", ["x"], np.ones((1, 1, 2), np.float32))
    same = RowSources("image", digest(RECIPES["image"]), ())
    same.add(tmp_path / "a.h5")
    assert "x-bytes" in same
    other = RowSources("image", digest({"weights": "fine-tuned"}), ())
    other.add(tmp_path / "a.h5")
    assert "x-bytes" not in other
    shard_images(tmp_path / "b.h5", ["y"], np.ones((1, 1, 2), np.float32), thumbnails=False)
    with_thumbnails = RowSources("image", digest(RECIPES["image"]), ("thumbnail",))
    with_thumbnails.add(tmp_path / "b.h5")
    assert len(with_thumbnails) == 0


def test_a_store_may_come_from_more_shards_than_a_process_may_open(tmp_path):
    resource = pytest.importorskip("resource")
    n, limits = 100, resource.getrlimit(resource.RLIMIT_NOFILE)
    features = np.arange(n * 2, dtype=np.float32).reshape(n, 1, 2)
    ids, captions = [f"{row}.jpg" for row in range(n)], [f"caption {row}" for row in range(n)]
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + n // 2, limits[1]))
    try:
        path = write(tmp_path, ids, ["train"] * n, captions, range(n), features, features[:, 0], shards=n)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with FeatureStore(path) as store:
        np.testing.assert_array_equal(store.image_features, features)


def roles_of(tmp_path, splits):
    ids = [f"{row}.jpg" for row in range(len(splits))]
    captions = [f"caption {row}" for row in range(len(splits))]
    n = len(splits)
    zeros = np.zeros((n, 1, 2), np.float32), np.zeros((n, 2), np.float32)
    with FeatureStore(write(tmp_path, ids, splits, captions, range(n), *zeros)) as store:
        return store.roles()


def test_trap_with_a_test_split_dev_chooses_and_test_reports(tmp_path):
    roles = roles_of(tmp_path, ["train", "dev", "test", "", "train"])
    assert (roles.selection_name, roles.report_name) == ("dev", "test")
    assert [part.tolist() for part in (roles.train, roles.selection, roles.report)] == [[0, 4], [1], [2]]


def test_trap_without_a_test_split_a_tenth_of_train_chooses_and_dev_reports(tmp_path):
    roles = roles_of(tmp_path, ["train"] * 1000 + ["dev"] * 50)
    assert (roles.selection_name, roles.report_name) == ("select", "dev")
    assert len(roles.selection) == pytest.approx(100, abs=25)
    assert sorted([*roles.train, *roles.selection]) == list(range(1000))
    assert roles.report.tolist() == list(range(1000, 1050))


@pytest.mark.parametrize("splits", [["dev", "test"], ["train", "train"], ["train", "dev"]])
def test_too_few_splits_are_an_error(tmp_path, splits):
    with pytest.raises(StoreError, match="too few"):
        roles_of(tmp_path, splits)


def test_trap_equal_pictures_in_two_splits_are_reported(tmp_path):
    path = simple(tmp_path)
    with h5py.File(path, "r+") as file:
        file["image/sha256"][4] = file["image/sha256"][0]  # dev repeats train
        file["image/sha256"][5] = file["image/sha256"][1]  # no split: no leak
    sign_hdf5(path)
    with FeatureStore(path) as store:
        assert store.duplicates_across_splits() == [("0.jpg", "4.jpg")]


def test_names_that_are_not_utf8_and_nul_characters_reach_the_ledger_readably(tmp_path):
    odd = [Failure("caf\udce9.jpg", "dataset", "image without captions"), Failure("a\0b", "caption", "NUL")]
    shard = tmp_path / "image-0.h5"
    shard_images(shard, ["x"], np.ones((1, 1, 2), np.float32), failures=odd)
    with h5py.File(shard) as file:
        assert file["failures/id"].asstr()[:].tolist() == ["caf\\udce9.jpg", "a\\0b"]


def test_a_store_damaged_anywhere_gives_an_error_of_one_line_or_a_finding(tmp_path):
    """One byte after another is flipped; nothing but an error of one line, or what was stored, may come of it."""
    path = simple(tmp_path, n=3)
    data = path.read_bytes()
    with FeatureStore(path) as store:
        whole = everything(store)
    generator = np.random.default_rng(0)
    findings = 0
    for place in generator.integers(len(data), size=150):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            with FeatureStore(path, check=False) as store:
                findings += bool(store.verify())
            with FeatureStore(path) as store:
                assert everything(store) == whole, place
        except OnceoverError as error:
            findings += 1
            assert "\n" not in str(error)
    assert findings > 0


def everything(store) -> list:
    """All that a command can read from a store."""
    features = [store.image_features[:].tobytes(), store.text_features[:].tobytes()]
    columns = [store.image_ids, store.image_paths, store.image_splits, store.sha256, store.captions]
    rest = [store.image_index.tolist(), store.truncated.tolist(), store.provenance, store.recipes, store.fingerprints]
    return [*features, *columns, *rest, store.failures, store.tokenizer_files, list(store.thumbnails())]


def test_changed_provenance_is_found(tmp_path):
    path = simple(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["provenance"] = file.attrs["provenance"].replace("now", "then")
    strip_checksum(path)
    with FeatureStore(path, check=False) as store:
        assert store.verify() == ["the attributes do not match their checksum"]
    with pytest.raises(StoreError, match="is damaged .the attributes do not match their checksum.; remove it"):
        FeatureStore(path)


def test_trap_bytes_that_hdf5_would_read_for_ever_are_compared_first(tmp_path):
    """Text of any length lies in heaps; a damaged one can keep the HDF5 library busy without an end."""
    path = simple(tmp_path)
    data = path.read_bytes()
    for place in [place for place in range(len(data)) if data.startswith(b"GCOL", place)]:
        path.write_bytes(data[: place + 16] + bytes(16) + data[place + 32 :])
        with pytest.raises(OnceoverError, match="its bytes do not match their checksum; remove it"):
            FeatureStore(path)


def test_features_are_compared_with_their_checksums_as_they_are_read(tmp_path):
    path = simple(tmp_path)
    with h5py.File(path, "r+") as file:
        file["image/features"][1, 0, 0] = 9.0
    with FeatureStore(path) as store:
        store.text_features[:]
        with pytest.raises(OnceoverError, match="rows from 0 of /image/features do not match their checksum"):
            store.image_features[4:5]


def test_a_store_of_an_earlier_version_without_checksums_of_blocks_is_read(tmp_path):
    path = simple(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["checksums"]
    sign_hdf5(path)
    strip_checksum(path)
    with FeatureStore(path) as store:
        assert not store.is_checked
        assert len(store.image_features[:]) == 6
        assert next(iter(store.thumbnails())) == b"jpeg of 0.jpg"
        assert store.verify() == []


def test_trap_a_store_that_reaches_outside_itself_is_refused(tmp_path):
    (tmp_path / "secret.txt").write_bytes(b"secret" * 100)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.zeros((6, 2, 3), np.float32)
    layout = h5py.VirtualLayout((6, 2, 3), np.float32)
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "features", (6, 2, 3))
    outside = [(str(tmp_path / "secret.txt"), 0, 600)]
    damages = {
        "is a link": lambda file: file.__setitem__("tokenizer/a.txt", h5py.ExternalLink("other.h5", "features")),
        "has its values in another": lambda file: file.create_dataset("tokenizer/a", (600,), "u1", external=outside),
        "features has its values": lambda file: file.create_virtual_dataset("tokenizer/features", layout),
        "claims the shape": lambda file: file.create_dataset("tokenizer/vocab", (2**36,), "u1", chunks=(2**20,)),
    }
    for number, (message, damage) in enumerate(damages.items()):
        (tmp_path / str(number)).mkdir()
        path = simple(tmp_path / str(number))
        with h5py.File(path, "r+") as file:
            damage(file)
        strip_checksum(path)
        with pytest.raises(OnceoverError, match=message):
            FeatureStore(path)


def test_a_store_that_is_overwritten_in_place_is_no_longer_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = simple(tmp_path / "a", 6)
    other = simple(tmp_path / "b", 9)
    with FeatureStore(path) as store:
        shutil.copyfile(other, path)
        with pytest.raises(OnceoverError, match="was changed while it was in use; run the command again"):
            store.image_features[:]


def test_an_open_store_stays_itself_when_another_takes_its_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path, other = simple(tmp_path / "a", 6), simple(tmp_path / "b", 9)
    with FeatureStore(path) as store:
        before = np.array(store.image_features), np.array(store.text_features)
        os.replace(other, path)
        for old, now in zip(before, (store.image_features, store.text_features), strict=True):
            np.testing.assert_array_equal(old, now)
    with FeatureStore(path) as store:
        assert len(store.image_features) == 9


def test_thumbnails_are_read_when_their_store_is_closed_and_never_from_another_one(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_column(file, "thumbnail", [b"one", b"three"])
    with h5py.File(tmp_path / "a.h5", "r") as file:
        column = Column(file["thumbnail"], tmp_path / "a.h5")
        unread = Column(file["thumbnail"], tmp_path / "a.h5")
    assert (len(column), column[1], list(column)) == (2, b"three", [b"one", b"three"])
    os.replace(shutil.copy(tmp_path / "a.h5", tmp_path / "other"), tmp_path / "a.h5")
    assert column[1] == b"three"  # of the file that is open
    with pytest.raises(StoreError, match="was replaced while it was in use; run the command again"):
        unread[1]


@pytest.mark.parametrize("read", [FeatureStore, read_embeddings])
def test_trap_a_file_that_may_not_be_read_is_not_called_damaged(read, store_file, run_dir, monkeypatch):
    def refused(path, *_options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("onceover.base.hdf5.open_regular", refused)
    with pytest.raises(PermissionError):
        read(store_file if read is FeatureStore else run_dir / "embeddings.h5")


def test_trap_what_is_mapped_is_the_file_that_was_opened(tmp_path):
    """A writer may have replaced it since."""
    for name, value in (("old", 1), ("new", 2)):
        with write_hdf5(tmp_path / f"{name}.h5") as writer:
            writer.file["values"] = np.full((9, 3), value, np.float32)
    with open_hdf5(tmp_path / "old.h5") as file:
        os.replace(tmp_path / "new.h5", tmp_path / "old.h5")
        mapped = memory_mapped(file["values"])
    assert isinstance(mapped, np.memmap)
    assert (mapped == 1).all()


def test_trap_ctrl_c_waits_for_a_file_that_a_library_is_writing(tmp_path):
    """In the midst of it, torch would make another error of it."""
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        assert done == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
