"""Stores at addresses: written here and put there, read through copies; cut connections, growth, refusals, commands."""

import dataclasses
import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import requests

from onceover.base import cache, drivers
from onceover.base.errors import OnceoverError
from onceover.extract import publishing, remote, sharded
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.remote import RemoteFolder, staging_path
from onceover.extract.repack import repack
from onceover.extract.share import extract_share
from onceover.extract.store import FeatureStore
from onceover.base.addresses import path_of
from onceover.base.worker import parse_worker

BUCKET = "s3://stores"


@pytest.fixture(scope="module")
def server():
    """The address of an object store, whose credentials and address are in the environment."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        drivers._shared.clear()
        drivers._answered.clear()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        requests.put(f"{endpoint}/stores", timeout=10).raise_for_status()
        yield endpoint
    drivers._shared.clear()
    drivers._answered.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    running.stop()


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
    return dataclasses.replace(extract_config, image_encoder=f"hf:{tiny_resnet}@random", batch_size=4)


@pytest.fixture(scope="module")
def local(tmp_path_factory, drawn, config):
    """The store of the drawn dataset as a folder of this machine."""
    path = tmp_path_factory.mktemp("local") / "drawn.store"
    extract(read_dataset(drawn), path, config, device="cpu")
    return path


@pytest.fixture
def address(server, request):
    """An address for a store of this test alone."""
    return f"{BUCKET}/{request.node.name[:40]}/x.store"


@pytest.fixture
def put(local, address):
    """The address of the drawn dataset's store."""
    repack(local, address)
    return address


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
