"""Imported features that share a space: it stands beside the trained heads, and in the table."""

import numpy as np
import pytest
import torch

import onceover
from onceover.extract.importing import import_features
from onceover.heads.checkpoint import load_run
from onceover.heads.closed_form import OWN_SHARE, chosen_share
from onceover.heads.embed import embed
from onceover.heads.training import fit
from onceover.retrieval.metrics import quality

DIM = 12
CAPTIONS = 2


def unit_rows(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def imported(tmp_path):
    """A function that imports 90 images and 180 captions of 12 numbers. ``shared``: whether they lie in one space."""

    def make(shared, positive=False, empty=False):
        generator = np.random.default_rng(0)
        images = unit_rows(generator.standard_normal((90, DIM)) + 0.5)
        if positive:
            images = unit_rows(np.abs(images))
        texts = np.repeat(images, CAPTIONS, axis=0) + 0.15 * generator.standard_normal((90 * CAPTIONS, DIM))
        if positive:
            texts = np.abs(texts)
        if empty:
            texts[3] = 0
        if not shared:
            texts = texts[:, ::-1] * generator.choice([-1, 1], DIM)
        np.save(tmp_path / "i.npy", images.astype(np.float32))
        np.save(tmp_path / "t.npy", texts.astype(np.float32))
        (tmp_path / "ids.txt").write_text("".join(f"{row}.jpg\n" for row in range(90)))
        splits = ["train"] * 40 + ["dev"] * 25 + ["test"] * 25
        lines = [f"{row // CAPTIONS}.jpg,caption {row},{splits[row // CAPTIONS]}\n" for row in range(90 * CAPTIONS)]
        (tmp_path / "t.csv").write_text("image,caption,split\n" + "".join(lines))
        store = tmp_path / f"{shared}.h5"
        import_features(
            tmp_path / "i.npy", tmp_path / "t.npy", tmp_path / "t.csv", store, image_ids=tmp_path / "ids.txt"
        )
        return onceover.FeatureStore(store)

    return make


@pytest.fixture
def config(fit_config, changed):
    return changed(fit_config, model={"embedding_dim": 4}, training={"num_epochs": 1, "cca": True, "refit": True})


def test_a_shared_space_is_kept_beside_heads_that_few_images_teach_less(imported, config, tmp_path, messages):
    with imported(shared=True) as store:
        made = fit(store, tmp_path / "run", config)
        own = load_run(tmp_path / "run").heads.members[1]
        images, texts, _ = embed(own, store, store.roles().report)
        np.testing.assert_allclose(images, unit_rows(store.image_features[65:90, 0]), atol=1e-5)
        np.testing.assert_allclose(texts, unit_rows(store.text_features[130:180]), atol=1e-5)
    assert [member["embedding_dim"] for member in made["members"]] == [4, DIM]
    assert made["members"][1]["weight"] == 0.9
    assert any(line.endswith(" of the features' own space") for line in messages)
    models = onceover.evaluate(tmp_path / "run", device="cpu").result["models"]
    assert models["zero_shot"]["rsum"] == pytest.approx(models["multimodal_closed_form"]["rsum"])
    assert models["zero_shot"]["rsum"] > models["multimodal_trained"]["rsum"] + 50
    assert models["multimodal"]["rsum"] >= models["zero_shot"]["rsum"] - 5


def test_a_space_that_images_and_captions_do_not_share_is_left_to_the_cca(imported, config, tmp_path):
    with imported(shared=False) as store:
        made = fit(store, tmp_path / "run", config)
        members = load_run(tmp_path / "run").heads.members
    assert len(made["members"]) == 2
    assert not torch.equal(members[1].text.weight, torch.eye(DIM))
    models = onceover.evaluate(tmp_path / "run", device="cpu").result["models"]
    assert models["zero_shot"]["rsum"] < models["cca"]["rsum"] - 50


def test_swapped_captions_teach_nothing_that_the_own_space_could_bring_back(imported, config, changed, tmp_path):
    with imported(shared=True) as store:
        fit(store, tmp_path / "run", changed(config, training={"shuffle_pairs": True}))
        heads = load_run(tmp_path / "run").heads
        report = quality(*embed(heads, store, store.roles().report))
    assert report["rsum"] < 250  # the own space alone has twice as much


def test_features_that_are_never_negative_are_compared_as_they_are_too(imported, config, changed, tmp_path):
    """Trained heads take their square roots first."""
    with imported(shared=True, positive=True) as store:
        fit(store, tmp_path / "run", changed(config, training={"refit": False, "members": 2}))
        heads = load_run(tmp_path / "run").heads
        assert heads.members[0].standardize["image"].root
        images, _, _ = embed(heads.members[-1], store, store.roles().report)
        np.testing.assert_allclose(images, unit_rows(store.image_features[65:90, 0]), atol=1e-5)


def test_a_caption_without_direction_leaves_the_own_space_out(imported, config, tmp_path, messages):
    with imported(shared=True, empty=True) as store:
        made = fit(store, tmp_path / "run", config)
    assert "some features are all zeros and have no direction: the features' own space is left out" in messages
    assert len(made["members"]) <= 2


def test_one_validation_image_cannot_drop_the_heads_without_training():
    """Everything ranks it first, and trained heads are no better."""
    only = (np.eye(1, 4, dtype=np.float32), np.eye(1, 4, dtype=np.float32), np.zeros(1, int))
    assert chosen_share(only, only, OWN_SHARE) == OWN_SHARE
