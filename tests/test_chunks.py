"""Chunks of a store that is larger than the memory: nothing is lost, nothing comes twice, and heads learn the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from onceover.base.files import read_json
from onceover.base.hdf5 import StoredRows
from onceover.configs.schema import Config, ModelConfig, TrainingConfig
from onceover.extract.store import FeatureStore
from onceover.heads import chunks as module
from onceover.heads import closed_form, training
from onceover.heads.batches import Batch
from onceover.heads.chunks import ChunkError, Chunks, blocks, chunks_needed, memory_on
from onceover.heads.training import TrainingError, fit
from onceover.retrieval.metrics import quality

PLAIN = {"image": torch.nn.Identity(), "text": torch.nn.Identity()}


@pytest.fixture(autouse=True)
def saved_at_every_look(monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)


@pytest.fixture
def small_chunks(monkeypatch):
    """The drawn store's features do not fit: runs of 4 images, about three chunks."""
    monkeypatch.setattr(module, "NEIGHBOURS", 4)
    monkeypatch.setattr(module, "OVERHEAD", 0)
    monkeypatch.setattr(module, "MIN_MEMORY", 0)


def test_every_picture_with_all_its_captions_comes_once_an_epoch(store, small_chunks):
    train = store.roles().train
    dealt = Chunks(store, train, store.image_index, PLAIN, 3, "cpu")
    orders = []
    for epoch in range(2):
        found = list(dealt.epoch(np.random.default_rng(epoch)))
        assert len(found) == 3
        orders.append(np.concatenate([chunk.image_rows for chunk in found]))
        assert sorted(orders[-1]) == train.tolist()
        for chunk in found:
            assert (np.diff(chunk.image_rows) > 0).all()
            np.testing.assert_array_equal(chunk.images, store.image_features[chunk.image_rows])
            np.testing.assert_array_equal(chunk.texts, store.text_features[chunk.caption_rows])
            assert set(store.image_index[chunk.caption_rows]) == set(chunk.image_rows)
            batch = Batch(chunk.image_rows[[3, 0]], np.array([1, 0]), chunk.caption_rows[[7]], np.array([0]))
            within = chunk.within(batch)
            assert (within.images.tolist(), within.captions.tolist()) == ([3, 0], [7])
    assert not np.array_equal(*orders)
    again = np.concatenate([chunk.image_rows for chunk in dealt.epoch(np.random.default_rng(0))])
    np.testing.assert_array_equal(again, orders[0])


def test_a_single_chunk_is_read_once_and_takes_nothing_from_the_generator(store):
    dealt = Chunks(store, store.roles().train, store.image_index, PLAIN, 1, "cpu")
    generator = np.random.default_rng(0)
    (first,), (second,) = (list(dealt.epoch(generator)) for _ in range(2))
    assert first is second
    assert generator.random() == np.random.default_rng(0).random()


def test_how_many_chunks_a_memory_makes(store, monkeypatch):
    train, selection = store.roles().train, store.roles().selection
    of_picture = 4 * (2 * 16 + 5 * 32)
    size, beside = len(train) * of_picture, len(selection) * of_picture
    monkeypatch.setattr(module, "MIN_MEMORY", 0)
    monkeypatch.setattr(module, "OVERHEAD", 1000)
    assert chunks_needed(store, train, selection, size + beside + 1000) == 1
    assert chunks_needed(store, train, selection, size + beside + 999) == 3  # three at a time; validation streams
    assert chunks_needed(store, train, selection, size // 4 + 1001) == 12
    together = store.roles().together()
    assert chunks_needed(store, together.train, together.selection, size + beside + 1000) == 1  # nothing counts twice
    assert chunks_needed(store, train[:1], train, of_picture * 30) == 2
    monkeypatch.undo()
    with pytest.raises(ChunkError, match="a memory of 500 MiB is too little to fit heads; give at least 2GiB"):
        chunks_needed(store, train, selection, 500 * 2**20)


def test_a_card_bounds_what_features_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (3 * 2**30, 80 * 2**30))
    card, processor = torch.device("cuda"), torch.device("cpu")
    assert [memory_on(card, gib * 2**30) // 2**30 for gib in (2, 64)] == [2, 3]
    assert memory_on(processor, 2**40) == 2**40
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2**30, 80 * 2**30))
    with pytest.raises(ChunkError, match="cuda has 1,024 MiB free, too little to fit heads; free at least 2GiB there"):
        memory_on(card, 2**40)


def test_blocks_are_all_rows_in_float32(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3 * 2)
    features = np.arange(16, dtype=np.float16).reshape(8, 2)
    found = list(blocks(features))
    assert [len(block) for block in found] == [3, 3, 2]
    assert torch.equal(torch.cat(found), torch.tensor(features).float())
    assert torch.equal(torch.cat(list(blocks(features, np.array([7, 0])))), torch.tensor(features[[7, 0]]).float())


@pytest.fixture(scope="module")
def settings():
    return Config(model=ModelConfig(embedding_dim=16), training=TrainingConfig(num_epochs=12, batch_size=12))


def test_heads_fitted_in_chunks_are_as_good_and_the_same_again(
    store, settings, small_chunks, tmp_path, run_dir, messages
):
    for name in ("a", "b"):
        fit(store, tmp_path / name, settings, memory=26_000)
    assert "the features do not fit 0.0 GiB: they are read in 4 shuffled chunks an epoch" in messages
    made = [read_json(tmp_path / name / "run.json", "run") for name in ("a", "b")]
    assert made[0]["chunks"] == 4
    assert (tmp_path / "a/heads.safetensors").read_bytes() == (tmp_path / "b/heads.safetensors").read_bytes()
    whole = json.loads((run_dir / "run.json").read_text())
    assert whole["chunks"] == 1
    assert made[0]["selection"]["rsum"] > 0.8 * whole["selection"]["rsum"]


def test_an_interrupted_fit_goes_on_with_the_chunks_it_was_begun_with(
    store, settings, small_chunks, tmp_path, monkeypatch
):
    fit(store, tmp_path / "whole", settings, memory=26_000)
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return quality(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "quality", interrupted)
        fit(store, tmp_path / "killed", settings, memory=26_000)
    fit(store, tmp_path / "killed", settings, memory=2**40)
    assert read_json(tmp_path / "killed/run.json", "run")["chunks"] == 4
    files = [(tmp_path / name / "heads.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_trap_more_memory_is_taken_where_the_first_was_too_little(store, settings, small_chunks, tmp_path):
    folder = tmp_path / "r"
    ensemble = replace(settings, training=replace(settings.training, num_epochs=1, members=3))
    with pytest.raises(TrainingError, match="3 members take .* GiB at least; give so much --memory"):
        fit(store, folder, ensemble, memory=26_000)
    assert fit(store, folder, ensemble, memory=2**40)["chunks"] == 1


def test_a_closed_form_is_fitted_on_a_sample_where_memory_is_short(
    store, settings, small_chunks, tmp_path, messages, monkeypatch
):
    monkeypatch.setattr(closed_form, "MIN_TRAIN", 20)
    with_cca = replace(settings, training=replace(settings.training, num_epochs=1, cca=True, refit=True))
    made = fit(store, tmp_path / "r", with_cca, memory=26_000)
    assert made["chunks"] > 1
    assert "the CCA is fitted on 20 of 36 images, as many as fit the memory" in messages
    assert sum(member["weight"] for member in made["members"]) == pytest.approx(1)


def test_features_are_read_when_they_are_asked_for(store_file):
    with FeatureStore(store_file) as store:
        features = store.image_features
        assert isinstance(features, StoredRows)
        assert features.shape == (60, 2, 16)
        whole = features[:]
        np.testing.assert_array_equal(features[[3, 4, 4, 59, 0]], whole[[3, 4, 4, 59, 0]])
        np.testing.assert_array_equal(features[10:20], whole[10:20])
        np.testing.assert_array_equal(features[-1], whole[-1])
        np.testing.assert_array_equal(features[np.arange(60) % 2 == 0], whole[::2])
        np.testing.assert_array_equal(features[:, 1], whole[:, 1])
        rows, views = np.array([7, 2, 7]), np.array([1, 0, 0])
        np.testing.assert_array_equal(features[rows, views], whole[rows, views])
