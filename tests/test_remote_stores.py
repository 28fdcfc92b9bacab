"""Stores at addresses: written here and put there, read through copies; cut connections, growth, refusals, commands."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import object_store, start_drivers_anew

from onceover.base import cache, drivers
from onceover.base.addresses import path_of
from onceover.base.errors import OnceoverError
from onceover.base.files import digest
from onceover.base.worker import parse_worker
from onceover.extract import publishing, remote
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.remote import RemoteFolder
from onceover.extract.repack import repack
from onceover.extract.share import extract_share
from onceover.extract.store import FeatureStore

BUCKET = "s3://stores"


@pytest.fixture(scope="module")
def server():
    """The address of an object store, whose credentials and address are in the environment."""
    with object_store("stores") as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    """The folder of the cache, empty."""
    monkeypatch.setenv("ONCEOVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ONCEOVER_CACHE_SIZE", raising=False)
    monkeypatch.setattr(cache, "_total", {})
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def config(extract_config, tiny_resnet):
    """Small batches, so that 60 images make several shards."""
    return dataclasses.replace(extract_config, image_encoder=f"hf:{tiny_resnet}@random", batch_size=8)


@pytest.fixture(scope="module")
def local(tmp_path_factory, drawn, config):
    """The store of the drawn dataset as a folder of this machine."""
    path = tmp_path_factory.mktemp("local") / "drawn.store"
    extract(read_dataset(drawn), path, config, device="cpu")
    return path


@pytest.fixture
def address(server, request):
    """An address for a store of this test alone."""
    return f"{BUCKET}/{digest(request.node.name)[:12]}/x.store"


@pytest.fixture
def put(local, address):
    """The address of the drawn dataset's store, whose files were copied there."""
    for file in local.iterdir():
        drivers.upload(file, f"{address}/{file.name}")
    return address


class Wire:
    """A connection to a server that can be cut after so many bytes.

    Attributes:
        port: where it takes connections. passed: bytes that went through, either way.
    """

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.passed = 0
        self._most = float("inf")
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, size):
        """Lets so many more bytes pass; then all connections are closed, and new ones at once."""
        self._most = self.passed + size

    def mend(self):
        """Lets all pass again."""
        self._most = float("inf")

    def close(self):
        """Ends all connections and takes no more."""
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets.append(far)
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while self.passed < self._most and (data := source.recv(16_384)):
                self.passed += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(server, monkeypatch):
    """The connection to the object store, which can be cut."""
    import s3fs

    wire = Wire(int(server.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    start_drivers_anew()
    yield wire
    wire.close()
    monkeypatch.undo()
    start_drivers_anew()


def objects_of(folder):
    """The names and sizes of the files in a folder."""
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def contents(path):
    """All that a store holds, as plain values; times of files aside."""
    with FeatureStore(path) as store:
        thumbnails = store.thumbnails()
        assert thumbnails is not None
        return [
            store.image_features[:].tobytes(),
            store.text_features[:].tobytes(),
            store.image_ids,
            store.image_splits,
            store.captions,
            store.image_index.tolist(),
            list(thumbnails),
            store.failures,
            store.tokenizer_files,
            store.recipes,
            store.fingerprints,
        ]


def objects(address):
    """The names and sizes of the files at an address."""
    return RemoteFolder(path_of(address)).sizes()


def message(call, *given, **named):
    with pytest.raises(OnceoverError) as error:
        call(*given, **named)
    return str(error.value)


def test_an_extraction_puts_the_shards_that_a_folder_would_have_and_reads_them_back(
    local, drawn, address, copies, config
):
    summary = extract(read_dataset(drawn), address, config, device="cpu")
    assert str(summary.path) == address
    assert objects(address) == {file.name: file.stat().st_size for file in local.iterdir()} | {
        "manifest.h5": objects(address)["manifest.h5"]
    }
    assert contents(address) == contents(local)
    shutil.rmtree(copies)
    assert contents(address) == contents(local)  # fetched
    with FeatureStore(address) as store:
        assert store.verify() == []
        assert store.nbytes == sum(objects(address).values())
    assert extract(read_dataset(drawn), address, config, device="cpu").up_to_date
    assert not any((copies / "unfinished").rglob("*.h5"))


def test_the_name_of_a_store_at_an_address_has_to_be_a_folder_that_can_be_written(server, drawn, config):
    dataset = read_dataset(drawn)
    assert "name it s3://stores/a/x.store" in message(extract, dataset, f"{BUCKET}/a/x.h5", config)
    assert "is a whole bucket; name a folder in it: s3://stores/NAME.store" in message(extract, dataset, BUCKET, config)
    assert "is on a web server, which is only read" in message(extract, dataset, "http://127.0.0.1:1/x.store", config)
    assert "there is no bucket" in message(extract, dataset, "s3://none-such/x.store", config)
    line = message(extract_share, dataset, f"{BUCKET}/a/x.store", config, parse_worker("1/2"))
    assert line.endswith("put it there at the end: onceover repack STORE --to s3://stores/a/x.store")
    assert "there is no feature store at s3://stores/a/x.store" in message(FeatureStore, f"{BUCKET}/a/x.store")


@pytest.mark.parametrize("passing", [20_000, 100_000])
def test_a_connection_cut_while_shards_are_put_leaves_nothing_that_is_taken_for_whole(
    local, drawn, address, config, wire, passing
):
    wire.cut_after(passing)
    line = message(extract, read_dataset(drawn), address, config, device="cpu")
    assert "then run the command again, which goes on with what is there" in line
    assert "\n" not in line
    wire.mend()
    there = objects(address)
    assert "manifest.h5" not in there
    assert there.items() <= objects_of(local).items()
    assert f"{address} is unfinished; run the same extract command again" in message(FeatureStore, address)
    summary = extract(read_dataset(drawn), address, config, device="cpu")
    assert summary.computed == {"image": 0, "text": 0}  # nothing is encoded again
    assert contents(address) == contents(local)


def test_a_connection_cut_while_shards_are_fetched_leaves_whole_copies_alone(local, put, copies, wire):
    with FeatureStore(put) as store:
        wire.cut_after(100_000)
        line = message(lambda: store.image_features[:])
        assert "cannot be reached" in line or "run the command again" in line
        fetched = [file for file in copies.rglob("*-*.h5") if not file.name.startswith(".")]
        assert all(file.stat().st_size == objects_of(local)[file.name] for file in fetched)
        assert not list(copies.rglob(".*aside*"))
        wire.mend()
        with FeatureStore(local) as origin:
            np.testing.assert_array_equal(store.image_features[:], origin.image_features[:])


def test_new_images_put_their_shards_alone_and_pruned_ones_leave_the_address(
    drawn, tmp_path, address, copies, config, monkeypatch
):
    data = Path(shutil.copytree(drawn, tmp_path / "data"))
    whole = (data / "captions.csv").read_text()
    fewer = "".join(line for line in whole.splitlines(keepends=True) if not line.startswith("images/000"))
    (data / "captions.csv").write_text(fewer)
    extract(read_dataset(data), address, config, device="cpu")
    before = objects(address)
    uploaded = []
    upload = publishing.upload
    monkeypatch.setattr(publishing, "upload", lambda *given: uploaded.append(given[0].name) or upload(*given))
    (data / "captions.csv").write_text(whole)
    shutil.rmtree(copies)  # as on another machine
    extract(read_dataset(data), address, config, device="cpu")
    after = objects(address)
    assert before.keys() <= after.keys()
    assert set(uploaded) == (after.keys() - before.keys()) | {"manifest.h5"}
    fsspec.filesystem("s3").pipe(f"{address}/notes.txt", b"mine")
    (data / "captions.csv").write_text(fewer)
    extract(read_dataset(data), address, config, device="cpu", prune=True)
    with FeatureStore(address) as store:
        assert store.verify() == []
        assert len(store.image_ids) == 50
        assert set(objects(address)) == {"manifest.h5", "notes.txt", *store.shards.table.names}


def test_rows_of_a_shard_that_is_missing_at_the_address_are_encoded_again(put, drawn, config):
    name = min(objects(put))
    drivers.remove(f"{put}/{name}")
    assert f"lacks 1 of its shards (the first: {name})" in message(FeatureStore, put)
    summary = extract(read_dataset(drawn), put, config, device="cpu")
    assert 0 < summary.computed["image"] < 60
    with FeatureStore(put) as store:
        assert store.verify() == []


def test_a_store_that_another_process_wrote_in_the_meantime_is_not_replaced(put, drawn, config, monkeypatch):
    manifest = fsspec.filesystem("s3").cat(f"{put}/manifest.h5")
    put_all = publishing._each

    def meanwhile(names, work, title):
        put_all(names, work, title)
        fsspec.filesystem("s3").pipe(f"{put}/manifest.h5", manifest[:-100] + manifest[-100:].replace(b'"', b"'"))

    monkeypatch.setattr(publishing, "_each", meanwhile)
    bare = dataclasses.replace(config, thumbnails=False)
    line = message(extract, read_dataset(drawn), put, bare, device="cpu")
    assert line.startswith(f"another process has written {put} in the meantime; then run the command again")


def test_a_store_is_repacked_to_an_address_and_back(local, address, tmp_path):
    repack(local, address)
    assert contents(address) == contents(local)
    assert repack(local, address).up_to_date
    repack(address, tmp_path / "back.h5")
    assert contents(tmp_path / "back.h5") == contents(local)
    assert f"{address} is the store itself" in message(repack, address, address)


def test_a_damaged_copy_is_fetched_again_and_a_damaged_shard_is_named(put, local, copies):
    assert contents(put) == contents(local)
    [copy, *_] = sorted(copies.rglob("image-*.h5"))
    damage(copy)
    [manifest] = copies.rglob("manifest.h5")
    damage(manifest)
    assert contents(put) == contents(local)
    drivers.upload(damage(copy), f"{put}/{copy.name}")
    with FeatureStore(put) as store:
        [problem] = store.verify()
    assert f"{put}/{copy.name} is damaged, or not the shard that the manifest names" in problem


def damage(file):
    """Changes a byte in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def test_copies_stay_within_the_size_that_is_set_and_other_files_stay(put, local, copies, monkeypatch):
    limit = sum(objects_of(local).values()) // 3
    monkeypatch.setenv("ONCEOVER_CACHE_SIZE", str(limit))
    monkeypatch.setattr(cache, "_total", {})
    mine = copies / "stores" / "mine.store" / "image-0123456789ab.h5"  # a store of the user's where copies are kept
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(limit))
    beside = copies / "stores" / "image-mine.h5"
    beside.write_bytes(bytes(limit))
    assert contents(put) == contents(local)
    left = [file.stat().st_size for file in (copies / "stores").glob("x.store-*/*-*.h5")]
    assert 0 < sum(left) <= limit
    assert mine.stat().st_size == beside.stat().st_size == limit
    monkeypatch.setenv("ONCEOVER_CACHE_SIZE", "much")
    shutil.rmtree(copies)
    assert "ONCEOVER_CACHE_SIZE is 'much', which is no size" in message(FeatureStore, put)


def test_threads_and_stores_share_copies(put, local, monkeypatch):
    fetched = Counter()
    download = remote.download
    monkeypatch.setattr(remote, "download", lambda text, path: fetched.update([text]) or download(text, path))
    with FeatureStore(put) as first, FeatureStore(put) as second, FeatureStore(local) as origin:
        fetched.clear()
        read = {}

        def reading(number, store):
            read[number] = store.image_features[:]

        threads = [threading.Thread(target=reading, args=item) for item in enumerate([first, second] * 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for values in read.values():
            np.testing.assert_array_equal(values, origin.image_features[:])
    assert len(read) == 6
    assert set(fetched.values()) == {1}


def test_a_store_in_the_memory_of_this_process_takes_the_same_way(local, drawn, config):
    repack(local, "memory://bucket/y.store")
    assert contents("memory://bucket/y.store") == contents(local)
    assert extract(read_dataset(drawn), "memory://bucket/y.store", config, device="cpu").up_to_date
    fsspec.filesystem("memory").store.clear()


def test_commands_take_an_address_for_a_store(put, tmp_path, run, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cpu = ("--device", "cpu")
    small = ("--set", "model.embedding_dim=16", "--set", "training.num_epochs=1", "--set", "training.batch_size=16")
    assert f"feature store {put} (a folder of " in run("info", put).stdout
    assert run("verify", put).stdout == f"{put} is sound\n"
    run("fit", "--store", put, "--run", tmp_path / "run", *small, *cpu)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["store"] == put
    run("evaluate", "--run", tmp_path / "run")
    run("index", "--run", tmp_path / "run")
    assert len(run("search", "--run", tmp_path / "run", "--query", "a red circle", *cpu).stdout.splitlines()) > 3
    run("evaluate", "--store", put)
    assert list(tmp_path.glob("x.store.*.json"))
    run("report", "--run", tmp_path / "run", "--out", tmp_path / "report.html")
    assert "feature store" in (tmp_path / "report.html").read_text()
    assert "there is no feature store at s3://stores/none.store" in fails(
        "fit", "--store", f"{BUCKET}/none.store", "--run", tmp_path / "other"
    )


def test_trap_a_folder_at_an_address_that_holds_other_files_is_refused(server, address, drawn, config, tmp_path):
    mine = tmp_path / "holiday.jpg"
    mine.write_bytes(b"mine")
    drivers.upload(mine, f"{address}/holiday.jpg")
    with pytest.raises(OnceoverError, match=r"holds something else than a feature store \(holiday.jpg\)"):
        extract(read_dataset(drawn), address, config, device="cpu")
    assert list(objects_of(path_of(address))) == ["holiday.jpg"]


def test_trap_a_copy_that_another_process_removes_is_fetched_again(put, local, monkeypatch):
    """Between the fetch and the first look at the copy."""
    removed = []
    real = RemoteFolder.fetch

    def fetch(self, names):
        names = list(names)
        real(self, names)
        if len(names) == 1 and names[0] not in removed:
            removed.append(names[0])
            (self.copies / names[0]).unlink()

    monkeypatch.setattr(RemoteFolder, "fetch", fetch)
    with FeatureStore(put) as store, FeatureStore(local) as expected:
        np.testing.assert_array_equal(store.image_features[:], expected.image_features[:])
    assert removed


def test_copies_that_a_writer_leaves_count_and_a_manifest_in_use_stays(address, drawn, config, copies, monkeypatch):
    monkeypatch.setenv("ONCEOVER_CACHE_SIZE", "1K")
    extract(read_dataset(drawn), address, config, device="cpu")
    manifest = next(copies.glob("stores/*/manifest.h5"))
    assert list(copies.glob("stores/*/*.h5")) == [manifest]
    os.utime(manifest, (0, 0))
    FeatureStore(address).close()
    assert manifest.stat().st_atime > 0


def test_a_size_of_the_cache_that_cannot_be_is_refused_before_anything_is_encoded(address, drawn, config, monkeypatch):
    monkeypatch.setenv("ONCEOVER_CACHE_SIZE", "abc")
    with pytest.raises(OnceoverError, match="ONCEOVER_CACHE_SIZE is 'abc', which is no size"):
        extract(read_dataset(drawn), address, config, device="cpu")
    assert RemoteFolder(path_of(address)).sizes() == {}


def test_a_kill_after_a_store_was_put_leaves_no_second_copy(address, drawn, config, copies, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publishing, "make_copies_folder", killed)
        extract(read_dataset(drawn), address, config, device="cpu")
    staged = {file.name: file.stat().st_ino for file in copies.glob("unfinished/*/x.store/*.h5")}
    assert "manifest.h5" in staged
    assert extract(read_dataset(drawn), address, config, device="cpu").up_to_date
    assert list(copies.glob("unfinished/*/*/*")) == []
    shards = {file.name: file.stat().st_ino for file in copies.glob("stores/*/*-*.h5")}
    assert shards.items() <= staged.items()
    assert len(shards) == len(staged) - 1
