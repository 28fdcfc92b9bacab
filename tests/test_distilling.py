"""An ensemble distilled into one pair of heads: what it keeps, what it writes, and what it refuses."""

import numpy as np
import pytest
import torch

from onceover.heads.checkpoint import RunError, load_run
from onceover.heads.distilling import _common_standardize, _in_terms_of, distill, principal_directions
from onceover.heads.embed import embed
from onceover.heads.ensemble import ensemble
from onceover.heads.training import fit
from onceover.retrieval.embeddings import read_embeddings


@pytest.fixture(scope="module")
def joined_run(tmp_path_factory, store_file, fit_config):
    """A run of three members, trained for an epoch and fitted again, with a CCA beside them."""
    import dataclasses

    from onceover.extract.store import FeatureStore

    training = dataclasses.replace(fit_config.training, num_epochs=1, members=3, cca=True, refit=True)
    folder = tmp_path_factory.mktemp("joined") / "run"
    with FeatureStore(store_file) as opened:
        fit(opened, folder, dataclasses.replace(fit_config, training=training))
    return folder


def scores(heads, store):
    images, texts, _ = embed(heads, store, np.arange(20))
    return images @ texts.T


def test_two_members_that_are_alike_are_distilled_into_what_each_of_them_is(store, run_dir, tmp_path):
    run = load_run(run_dir)
    ensemble(store, [run, load_run(run_dir)], tmp_path / "two")
    made = distill(store, load_run(tmp_path / "two"), tmp_path / "one")
    pair = load_run(tmp_path / "one")
    assert len(made["members"]) == 1
    np.testing.assert_allclose(scores(pair.heads, store), scores(run.heads, store), atol=1e-4)
    found = read_embeddings(tmp_path / "one/embeddings.h5")
    assert found.images.shape == (60, run.heads.embedding_dim)
    assert found.splits == read_embeddings(run_dir / "embeddings.h5").splits


def test_what_the_distilled_pair_scores_is_near_what_the_ensemble_scores(store, joined_run, tmp_path, messages):
    run = load_run(joined_run)
    distill(store, run, tmp_path / "wide", dim=24)
    pair = load_run(tmp_path / "wide").heads
    correlation = np.corrcoef(scores(pair, store).ravel(), scores(run.heads, store).ravel())[0, 1]
    assert correlation > 0.97
    assert any(line.startswith("24 dimensions hold 9") for line in messages)


def test_members_that_take_different_features_are_distilled_with_all_of_them(store, run_dir, tmp_path):
    """As those of several stores on the joined one, whose other columns have a scale of 0."""
    run = load_run(run_dir)
    members = []
    for taken in (slice(0, 6), slice(6, None)):
        member = load_run(run_dir).heads
        for layer in member.standardize.values():
            scale = torch.zeros_like(layer.scale)
            scale[taken] = layer.scale[taken]
            layer.scale.copy_(scale)
        members.append(member)
    common = _common_standardize(members, "image")
    for name, value in run.heads.standardize["image"].state_dict().items():
        assert torch.equal(common.state_dict()[name], value), name
    weight, bias = _in_terms_of(common, members[1], "image")
    features = torch.from_numpy(store.image_features[:5])
    expected = members[1].image(members[1].standardize["image"](features))
    torch.testing.assert_close(common(features) @ weight + bias, expected)


def test_the_principal_directions_of_the_train_vectors_are_those_of_numpys_svd(joined_run):
    embeddings = read_embeddings(joined_run / "embeddings.h5")
    directions, kept = principal_directions(embeddings, 5)
    images, texts, _ = embeddings.vectors_of("train")
    rows = np.concatenate([images / len(images) ** 0.5, texts / len(texts) ** 0.5]).astype(np.float64)
    _, values, basis = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(np.abs(basis[:5] @ directions.numpy()), np.eye(5), atol=1e-3)
    assert kept == pytest.approx((values[:5] ** 2).sum() / (values**2).sum())


def test_a_distilled_run_says_where_it_is_from_and_keeps_what_the_validation_images_chose(store, joined_run, tmp_path):
    run = load_run(joined_run)
    made = distill(store, run, tmp_path / "pair")
    assert made["distilled"] == str(joined_run.resolve())
    for key in ("selection", "train_pictures", "fingerprints"):
        assert made[key] == run.provenance[key], key
    few = distill(store, run, tmp_path / "few", dim=4)
    assert 0 < few["betas"]["image"] < made["betas"]["image"], "scores of fewer dimensions are spread further"
    assert made["space"] != run.provenance["space"]
    assert load_run(tmp_path / "pair").config.model.embedding_dim == 16
    again = distill(store, run, tmp_path / "again")
    assert again["space"] == made["space"]


def test_what_cannot_be_distilled_is_refused_in_a_line(store, run_dir, joined_run, tmp_path, fit_config, changed):
    with pytest.raises(RunError, match="has one pair of heads; distil an ensemble"):
        distill(store, load_run(run_dir), tmp_path / "a")
    most = sum(member["embedding_dim"] for member in load_run(joined_run).provenance["members"])
    with pytest.raises(RunError, match=f"has {most} dimensions, which cannot be made into {most + 1}"):
        distill(store, load_run(joined_run), tmp_path / "a", dim=most + 1)
    fit(store, tmp_path / "mlp", changed(fit_config, model={"head": "mlp"}, training={"num_epochs": 1, "members": 2}))
    with pytest.raises(RunError, match="heads that are not linear"):
        distill(store, load_run(tmp_path / "mlp"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(RunError, match="mine"):
        distill(store, load_run(joined_run), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir() if not path.name.startswith(".")] == ["notes.txt"]


def test_the_command_distils_a_run_and_names_the_next_one(run, joined_run, tmp_path):
    told = run("distill", "--run", joined_run, "--out", tmp_path / "pair", "--dim", 8).stderr
    assert "one pair of heads, 8 dimensions" in told
    assert f"onceover compare {joined_run} {tmp_path / 'pair'}" in told
    assert "multimodal" in run("evaluate", "--run", tmp_path / "pair").stdout
    about = run("info", tmp_path / "pair").stdout
    assert f"distilled   in closed form of {joined_run}" in about
    assert "searched    8 dimensions" in about
    assert (
        "a pair that was distilled in closed form has no curve"
        in run("plot", "--run", tmp_path / "pair", "--out", tmp_path / "figures").stderr
    )
    assert (tmp_path / "figures/pca.png").exists()
