"""Engines: whichever has the shards encoded, the store is the same; one can be added from outside."""

import json
import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onceover.base.files import digest, write_once
from onceover.base.hdf5 import damaged_parts, open_hdf5
from onceover.base.registry import RegistryError
from onceover.extract import encode
from onceover.extract import plan as planning
from onceover.extract.encode import Progress
from onceover.extract.encoders import EncoderError
from onceover.extract.encoding import devices
from onceover.extract.engines import ENGINES, _several, engine_for
from onceover.extract.engines._forks import ForkError
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.plan import is_plan, plan_shards, shards_of
from onceover.extract.store import FeatureStore

OUTSIDE = """
import pickle
from onceover.extract.encode import Progress
from onceover.extract.encoders import EncoderError
from onceover.extract.encoding import devices

ENCODED = []

def workers(device):
    return 1

def describe(kind, device):
    return "one by one, the last first"

def run(encoding, shards, device):
    copy = pickle.loads(pickle.dumps(encoding))
    for shard in reversed(shards):
        copy(pickle.loads(pickle.dumps(shard)))
        ENCODED.append(shard.file.name)
        yield Progress(shard.size, {"encode": 1.0})
"""

# the tests of ray, which takes seconds to start, are in test_ray.py
LOCAL = [name for name in ENGINES.names() if name != "ray"]


def values(path: Path) -> dict:
    """All that a store holds, but for what says how and when it was made."""
    with FeatureStore(path) as store, open_hdf5(path) as file:
        assert damaged_parts(file) == []
        return {
            "images": store.image_features[:].tobytes(),
            "texts": store.text_features[:].tobytes(),
            "ids": store.image_ids,
            "captions": store.captions,
            "fingerprints": store.fingerprints,
            "failures": store.failures,
        }


@pytest.mark.parametrize("name", LOCAL)
def test_every_engine_makes_the_same_store(name, drawn, store_file, extract_config, tmp_path):
    """The contract: every shard is encoded and written once, and what is done adds up to all rows."""
    engine = ENGINES.load(name)
    assert engine.workers(torch.device("cpu")) >= 1
    for kind in ("image", "text"):
        assert engine.describe(kind, torch.device("cpu"))
    made = extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu", engine=name)
    assert made.computed == {"image": 60, "text": 300}
    assert {kind: speed.rows for kind, speed in made.speed.items()} == {"image": 60, "text": 300}
    assert values(tmp_path / "s.h5") == values(store_file)
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.provenance["image"]["engine"] == name


def test_an_engine_of_another_package_gets_shards_that_can_be_pickled(
    outside, drawn, store_file, extract_config, tmp_path
):
    outside("onceover.engines", "backwards", OUTSIDE)
    extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu", engine="backwards")
    assert values(tmp_path / "s.h5") == values(store_file)
    encoded = ENGINES.load("backwards").ENCODED
    images = [name for name in encoded if name.startswith("image")]
    assert len(images) == 8
    assert images == sorted(images, reverse=True)


def test_an_unknown_engine_is_refused_before_anything_is_encoded(drawn, extract_config, tmp_path):
    with pytest.raises(RegistryError, match="no engine 'clouds'"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu", engine="clouds")
    assert not (tmp_path / "s.h5").exists()


def test_auto_takes_threads_on_a_processor_and_processes_that_feed_anything_else():
    assert engine_for("auto", [torch.device("cpu")])[0] == "threads"
    assert engine_for("auto", [torch.device("meta")])[0] == "processes"


@pytest.mark.parametrize("name", LOCAL)
def test_an_error_in_one_shard_ends_an_engine_and_keeps_what_is_written(
    name, drawn, extract_config, tmp_path, monkeypatch
):
    write = encode.write_shard
    written = []

    def failing(file, *rest):
        if len(written) >= 3:
            raise OSError(28, "No space left on device")
        write(file, *rest)
        written.append(file)

    monkeypatch.setattr(encode, "write_shard", failing)
    with pytest.raises(OSError, match="No space left on device"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu", engine=name)
    assert all(file.exists() for file in written)
    monkeypatch.setattr(encode, "write_shard", write)
    made = extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu", engine=name)
    assert made.reused["image"] > 0


@pytest.mark.parametrize(
    ("kind", "count", "workers", "sizes"),
    [
        ("image", 0, 2, []),
        ("image", 1, 2, [1]),
        ("image", 50, 2, [16, 16, 16, 2]),
        ("image", 16 * 64 * 3 + 5, 2, [48] * 64 + [5]),
        ("image", 10**5, 2, [128] * 781 + [32]),
        ("text", 1100, 2, [64] * 16 + [64, 12]),
        ("text", 64 * 64 * 8, 2, [512] * 64),
    ],
)
def test_shards_are_runs_of_whole_batches_and_as_many_as_keep_workers_busy(kind, count, workers, sizes, tmp_path):
    plan = plan_shards(kind, np.arange(count), 16, workers)
    assert is_plan(plan)
    shards = shards_of(plan, kind, tmp_path)
    assert [shard.size for shard in shards] == sizes
    assert len({shard.file for shard in shards}) == len(shards)
    covered = []
    for shard in shards:
        first = shard.batches.start * plan["batch"]
        covered += shard.rows[first : first + shard.size]
    assert covered == list(range(count))


@given(rows=st.sets(st.integers(0, 60)), batch=st.integers(1, 5), kind=st.sampled_from(["image", "text"]))
@settings(max_examples=60, deadline=None)
def test_a_plan_has_each_row_once_and_in_its_order_whatever_rows_are_new(rows, batch, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CAPTION_BLOCK", 12)
        plan = plan_shards(kind, np.array(sorted(rows), np.int64), batch, 1)
        assert json.loads(json.dumps(plan)) == plan
        assert is_plan(plan)
        assert plan["runs"] == sorted({*plan["runs"]})  # neighbours are in one run
        shards = shards_of(plan, kind, Path("folder"))
        covered = []
        for shard in shards:
            first = shard.batches.start * plan["batch"]
            covered += shard.rows[first : first + shard.size]
        earlier = {"todo": sorted(rows)} | {name: plan[name] for name in ("batch", "batches", "block")}
        assert is_plan(earlier)  # of a version that listed the rows: workers that have begun with it go on
        same = shards_of(earlier, kind, Path("folder"))
    assert covered == sorted(rows)
    assert [(shard.rows, shard.batches, shard.size) for shard in same] == [
        (shard.rows, shard.batches, shard.size) for shard in shards
    ]


def test_a_plan_of_an_earlier_version_keeps_the_names_of_its_shards():
    plan = {"todo": [0, 1, 2, 7], "batch": 2, "batches": 1, "block": 2}
    tag = digest(plan)[:12]
    files = [shard.file.name for shard in shards_of(plan, "image", Path("folder"))]
    assert files == [f"image-{tag}-00000.h5", f"image-{tag}-00001.h5"]


def test_progress_and_shards_are_plain_values(tmp_path):
    shard = shards_of(plan_shards("image", np.array([3, 4]), 1, 1), "image", tmp_path)[0]
    assert pickle.loads(pickle.dumps(shard)) == shard
    assert pickle.loads(pickle.dumps(Progress(1, {"encode": 2.0}))) == Progress(1, {"encode": 2.0})


@pytest.fixture
def soon_there(forkserver, monkeypatch):
    """Has processes of devices find the libraries imported; one test does with those that import them."""
    monkeypatch.setattr(_several.multiprocessing, "get_context", lambda _method: forkserver)


def test_several_devices_work_in_a_process_each_and_the_store_is_the_same(
    drawn, store_file, extract_config, tmp_path, told, soon_there
):
    dataset = read_dataset(drawn)
    images = replace(dataset, captions=[], image_index=dataset.image_index[:0])
    made = extract(images, tmp_path / "s.h5", extract_config, device="cpu,cpu")
    assert made.speed["image"].rows == 60
    assert any("on cpu, a process for each of cpu, cpu, " in line for line in told)
    with FeatureStore(tmp_path / "s.h5") as store, FeatureStore(store_file) as other:
        assert store.image_features[:].tobytes() == other.image_features[:].tobytes()


class Noting(encode.Encoding):
    """Writes empty files, each after a while, and notes who wrote which.

    Args:
        failing: the end of the name of the shard at which it fails.
    """

    kind = "image"

    def __init__(self, failing="none", seconds=0.0):
        super().__init__(None)
        self.failing = failing
        self.seconds = seconds

    def on(self, _device):
        return self

    def read(self, shard):
        (shard.file.parent / f"{os.getpid()}.pid").touch()
        time.sleep(self.seconds)
        yield shard

    def begin(self, shard):
        return lambda: encode.EncodedBatch({"row": []}, [], {})

    def columns(self, _rows):
        return {}

    def write(self, shard, _batches):
        if shard.file.name.endswith(self.failing):
            raise ZeroDivisionError
        write_once(shard.file, str(os.getpid()).encode())
        with open(shard.file.parent / "written", "a") as file:
            file.write(f"{shard.file.name}\n")


def shards_in(folder, count):
    folder.mkdir()
    return shards_of(plan_shards("image", np.arange(count), 1, count), "image", folder)


def test_an_error_on_one_of_several_devices_ends_all_and_keeps_what_is_written(tmp_path):
    shards = shards_in(tmp_path / "parts", 8)
    engine = engine_for("threads", [torch.device("cpu")] * 2)[1]
    with pytest.raises(ZeroDivisionError):
        list(engine.run(Noting("5.h5", 0.1), shards, torch.device("cpu")))
    assert 0 < len(list((tmp_path / "parts").glob("*.h5"))) < len(shards)


def test_a_process_of_a_device_that_is_killed_is_told_of(tmp_path, soon_there):
    shards = shards_in(tmp_path / "parts", 8)
    engine = engine_for("threads", [torch.device("cpu")] * 2)[1]
    with pytest.raises(ForkError, match="was killed, perhaps for want of memory; run the command again"):
        for _ in engine.run(Noting(seconds=0.1), shards, torch.device("cpu")):
            kill_one(tmp_path / "parts")
    assert list((tmp_path / "parts").glob("*.h5"))


def kill_one(folder):
    """Kills a process that has begun a shard, once a shard is written, if none was killed before."""
    first = sorted(folder.glob("*.pid"))[0]
    if list(folder.glob("*.h5")) and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(int(first.stem), signal.SIGKILL)


def test_devices_that_do_not_go_together_are_refused(drawn, extract_config, tmp_path, monkeypatch):
    with pytest.raises(EncoderError, match="the device 'nowhere' cannot be used"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu,nowhere")
    monkeypatch.setattr(devices, "pick_device", torch.device)
    with pytest.raises(EncoderError, match="the devices cpu,meta are of several kinds"):
        extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu,meta")
    assert not (tmp_path / "s.h5.parts").exists()
