"""A cluster of Ray: the store of one machine, whichever worker or node is lost, and sweeps that are spread."""

import dataclasses
import os
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch

from onceover.base.extras import Extra, MissingPackageError
from onceover.base.files import FileError
from onceover.extract.engines import ray as engine
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.plan import plan_shards, shards_of
from onceover.extract.store import FeatureStore, parts_folder
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
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {**NODE, "include_dashboard": False, "_system_config": quick}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(**NODE)
    engine.connect(nodes.address)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def noting(load, folder, **options):
    """Loads an encoder, and notes which process has it."""
    (folder / f"{os.getpid()}.pid").touch()
    return load(**options)


def kill_one(folder):
    os.kill(int(min(folder.glob("*.pid")).stem), signal.SIGKILL)


def shards(path):
    """The shards of an unfinished store: the file behind each name, and when it was written."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in parts_folder(path).glob("*.h5")}


def test_a_killed_worker_and_a_lost_node_lose_nothing_and_write_nothing_twice(
    cluster, drawn, store, extract_config, tmp_path, told, monkeypatch
):
    path = tmp_path / "s.h5"
    dataset = read_dataset(drawn)
    images = dataclasses.replace(dataset, captions=[], image_index=dataset.image_index[:0])
    run = engine.run
    written = {}

    def disturbed(encoding, todo, device):
        encoding._load = partial(noting, encoding._load, tmp_path)
        for number, progress in enumerate(run(encoding, todo, device)):
            if number == 0:
                kill_one(tmp_path)
            if number == 3:
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            assert written.items() <= shards(path).items(), "a shard was written again"
            written.update(shards(path))
            yield progress

    monkeypatch.setattr(engine, "run", disturbed)
    made = extract(images, path, extract_config, device="cpu", engine="ray")
    assert len(written) == 8
    assert len(list(tmp_path.glob("*.pid"))) >= 3, "a worker was started anew"
    assert made.computed == {"image": 60}
    assert made.speed["image"].rows == 60
    assert any("on cpu, 2 workers of Ray, 2 shards at a time" in line for line in told)
    with FeatureStore(path) as made_store:
        assert made_store.verify() == []
        assert made_store.image_features[:].tobytes() == store.image_features[:].tobytes()
        assert made_store.provenance["image"]["engine"] == "ray"
    assert engine.actors(CPU) == 1
    cluster.add_node(**NODE)
    assert engine.actors(CPU) == 2


def failing(unit):
    raise ZeroDivisionError(unit)


def test_an_error_of_the_work_in_a_cluster_is_the_one_that_it_was(cluster):
    with pytest.raises(ZeroDivisionError, match="a unit"):
        list(engine.spread(failing, ["a unit"], CPU))


def test_a_sweep_is_spread_over_a_cluster(cluster, store, tmp_path):
    overrides = ["training.num_epochs=2", "training.batch_size=12", "training.check_every=1", "model.embedding_dim=8"]
    settings = expand(None, overrides, ["model.temperature=0.05,0.1"], 1)
    whole = sweep(store, tmp_path / "whole", settings, Judge())
    spread = sweep(store, tmp_path / "spread", settings, Judge(), cluster=engine)
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
    shards = shards_of(plan_shards("image", np.arange(1), 1, 1), "image", tmp_path / "nowhere")
    with pytest.raises(FileError, match="needs a store in a folder that all nodes share at the same path"):
        engine._encode(None, "cpu", shards)


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
    options = ["sweep", "--store", store_file, "--out", tmp_path / "sweep", "--engine", "ray"]
    assert "pip install 'onceover-retrieval[ray]'" in fails(*options, "--grid", "model.temperature=0.1,0.2")
