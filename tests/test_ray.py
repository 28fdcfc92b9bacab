"""A cluster of Ray: the store of one machine, whichever worker or node is lost, and sweeps that are spread."""

import os
import signal
import sys
import time

import pytest
import torch

from onceover.base.extras import Extra, MissingPackageError
from onceover.base.files import FileError, write_once
from onceover.extract import encode
from onceover.extract.engines import ray as engine
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.plan import plan_shards, shards_of
from onceover.extract.store import FeatureStore
from onceover.heads.grid import expand
from onceover.heads.sweep import sweep
from onceover.retrieval.leaderboard import Judge

CPU = torch.device("cpu")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes on this machine, each with one processor, to which this process is connected."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'onceover-retrieval[ray]'")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import the tests
    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes.add_node(**NODE)
    engine.connect(nodes.address)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def values(path):
    """All that a store holds, but for what says how and when it was made."""
    with FeatureStore(path) as store:
        assert store.verify() == []
        return {
            "images": store.image_features[:].tobytes(),
            "texts": store.text_features[:].tobytes(),
            "ids": store.image_ids,
            "captions": store.captions,
            "index": store.image_index.tolist(),
            "fingerprints": store.fingerprints,
            "failures": store.failures,
        }


class Noting(encode.Encoding):
    """Writes a file for each shard, after a while, and notes it; fails at the one with a certain name."""

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
        return lambda: encode.EncodedBatch({"row": [0]}, [], {})

    def columns(self, _rows):
        return {}

    def write(self, shard, _batches):
        if shard.file.name.endswith(self.failing):
            raise ZeroDivisionError(shard.file.name)
        write_once(shard.file, b"")
        with open(shard.file.parent / "written", "a") as file:
            file.write(f"{shard.file.name}\n")


def shards_in(folder, count):
    folder.mkdir()
    return shards_of(plan_shards("image", list(range(count)), 1, count), "image", folder)


def written_in(folder):
    """The names of the shards that were written, as often as they were."""
    return sorted((folder / "written").read_text().split())


def test_a_cluster_makes_the_store_of_one_machine(cluster, drawn, store_file, extract_config, tmp_path, told):
    made = extract(read_dataset(drawn), tmp_path / "s.h5", extract_config, device="cpu", engine="ray")
    assert made.computed == {"image": 60, "text": 300}
    assert {kind: speed.rows for kind, speed in made.speed.items()} == {"image": 60, "text": 300}
    assert any("on cpu, 2 workers of Ray, 2 shards at a time" in line for line in told)
    assert values(tmp_path / "s.h5") == values(store_file)
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.provenance["image"]["engine"] == "ray"


def test_an_error_in_a_cluster_is_the_one_that_it_was_and_keeps_what_is_written(cluster, tmp_path):
    shards = shards_in(tmp_path / "parts", 8)
    with pytest.raises(ZeroDivisionError, match="5.h5"):
        list(engine.run(Noting("5.h5"), shards, CPU))
    assert list((tmp_path / "parts").glob("*.h5"))


def test_a_killed_worker_loses_nothing_and_nothing_is_written_twice(cluster, tmp_path):
    shards = shards_in(tmp_path / "parts", 8)
    rows = 0
    killed = None
    for progress in engine.run(Noting(seconds=0.2), shards, CPU):
        rows += progress.rows
        if killed is None:
            killed = int(min((tmp_path / "parts").glob("*.pid")).stem)
            os.kill(killed, signal.SIGKILL)
    assert rows == len(shards)
    assert written_in(tmp_path / "parts") == [shard.file.name for shard in shards]


def test_a_lost_node_loses_nothing_and_nothing_is_written_twice(cluster, tmp_path):
    shards = shards_in(tmp_path / "parts", 8)
    lost = cluster.list_all_nodes()[-1]
    rows = 0
    for progress in engine.run(Noting(seconds=0.2), shards, CPU):
        rows += progress.rows
        if rows == 2:
            cluster.remove_node(lost, allow_graceful=False)
    assert rows == len(shards)
    assert written_in(tmp_path / "parts") == [shard.file.name for shard in shards]
    assert engine.actors(CPU) == 1
    cluster.add_node(**NODE)
    assert engine.actors(CPU) == 2


def test_a_sweep_is_spread_over_a_cluster(cluster, store, tmp_path):
    overrides = ["training.num_epochs=2", "training.batch_size=12", "training.check_every=1", "model.embedding_dim=8"]
    settings = expand(None, overrides, ["model.temperature=0.05,0.1,0.2,0.3"], 1)
    whole = sweep(store, tmp_path / "whole", settings, Judge(), halving=True)
    spread = sweep(store, tmp_path / "spread", settings, Judge(), halving=True, cluster=engine)
    assert spread.keys() == whole.keys()
    for name, result in whole.items():
        for key in ("outcome", "epochs", "best_epoch"):
            assert spread[name][key] == result[key]


@pytest.mark.parametrize(
    ("nodes", "team"),
    [([1, 1], (2, 1, 0)), ([2], (1, 2, 0)), ([6], (2, 3, 0)), ([8, 16], (6, 4, 0)), ([8, 3], (11, 1, 0))],
)
def test_workers_get_up_to_four_processors_and_leave_few_idle(nodes, team):
    assert engine._cpu_team(nodes) == team


def test_a_cluster_without_a_gpu_is_refused_where_one_is_asked_for(cluster):
    with pytest.raises(engine.RayError, match="no node of the cluster has a place for cuda; start nodes that have"):
        engine.workers(torch.device("cuda"))


def test_a_folder_that_a_node_does_not_share_is_refused(tmp_path):
    shards = shards_of(plan_shards("image", [0], 1, 1), "image", tmp_path / "nowhere")
    with pytest.raises(FileError, match="needs a store in a folder that all nodes share at the same path"):
        engine._encode(Noting(), "cpu", shards)


def test_what_does_not_go_with_a_cluster_is_refused(fails, drawn, store_file, tmp_path):
    options = ["extract", "--data", drawn, "--store", tmp_path / "s.h5"]
    assert "give it with --engine ray" in fails(*options, "--address", "host:6379")
    assert "the kind of device alone" in fails(*options, "--engine", "ray", "--device", "cuda:0,cuda:1")
    assert "leave out --worker" in fails(*options, "--engine", "ray", "--worker", "1/2")


def test_a_missing_ray_says_how_to_install_it(fails, drawn, store_file, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "RAY", Extra("ray", "ray", "ray_that_is_not_there"))
    with pytest.raises(MissingPackageError, match="--engine ray needs the package ray .*onceover-retrieval\\[ray\\]"):
        engine.connect()
    options = ["extract", "--data", drawn, "--store", tmp_path / "s.h5", "--engine", "ray"]
    assert "pip install 'onceover-retrieval[ray]'" in fails(*options)
    assert "pip install 'onceover-retrieval[ray]'" in fails(
        "sweep", "--store", store_file, "--out", tmp_path / "sweep", "--engine", "ray"
    )
