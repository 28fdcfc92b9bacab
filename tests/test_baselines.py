"""Baselines against independent implementations and explicit loops, on planted data."""

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge

from onceover.heads.models import Standardize
from onceover.retrieval import baselines, closed_form
from onceover.retrieval.baselines import (
    MAPS,
    Pairs,
    choose,
    neighbours,
    random_orthogonal,
    standardised,
    unlearned,
)
from onceover.retrieval.closed_form import align, cca, ridge
from onceover.retrieval.metrics import quality, report
from onceover.retrieval.ranks import MetricsError, rank


def planted(seed, pictures, noise=0.4, captions=2):
    """Images and captions that share four latent numbers, mixed by the same maps for every seed."""
    maps = np.random.default_rng(99)
    image_map, text_map = maps.standard_normal((4, 12)), maps.standard_normal((4, 9))
    generator = np.random.default_rng(seed)
    latent = generator.standard_normal((pictures, 4))
    index = np.repeat(np.arange(pictures), captions)
    images = latent @ image_map + noise * generator.standard_normal((pictures, 12))
    texts = latent[index] @ text_map + noise * generator.standard_normal((len(index), 9))
    return Pairs(images, texts, index)


@pytest.fixture
def data():
    return standardised(planted(0, 300), planted(1, 80), planted(2, 80))


def test_features_are_standardised_as_the_heads_do_it():
    generator = np.random.default_rng(0)
    images = generator.exponential(size=(50, 6)).astype(np.float32)  # never negative: square roots
    images[:, 2] = 3.0
    texts = generator.standard_normal((70, 5)).astype(np.float32)
    train = Pairs(images, texts, generator.integers(50, size=70))
    other = Pairs(images[:9] + 1, texts[:9] - 1, np.arange(9))
    mine = standardised(train, other)
    for rows, side in ((images, "images"), (texts, "texts")):
        layer = Standardize(rows.shape[1])
        layer.fit(lambda rows=rows: [torch.from_numpy(rows)])
        for pairs, features in ((mine[0], rows), (mine[1], getattr(other, side))):
            expected = layer(torch.from_numpy(features)).numpy()
            np.testing.assert_allclose(getattr(pairs, side), expected, atol=2e-5)


def test_moments_are_those_of_captions_with_their_pictures(data):
    train = data[0]
    images = train.images[train.image_index]
    expected = images.T @ images, train.texts.T @ train.texts, images.T @ train.texts
    for found, wanted in zip(closed_form._moments(train), expected, strict=True):
        np.testing.assert_allclose(found, wanted / 600, atol=1e-10)


def test_cca_finds_the_canonical_correlations_that_scikit_learn_finds(data, monkeypatch):
    train = data[0]
    monkeypatch.setattr(closed_form, "STRENGTHS", (1e-9,))
    monkeypatch.setattr(closed_form, "DIMENSIONS", (4,))
    monkeypatch.setattr(closed_form, "POWERS", (0,))
    monkeypatch.setattr(closed_form, "unit_rows", lambda rows: rows)
    ((settings, embed),) = cca(train)
    assert settings == {"strength": 1e-9, "dimensions": 4, "power": 0}
    images, texts = embed(Pairs(train.images[train.image_index], train.texts, np.arange(600)))
    ours = [np.corrcoef(images[:, k], texts[:, k])[0, 1] for k in range(4)]
    theirs = CCA(4, max_iter=5000, tol=1e-12).fit(train.images[train.image_index], train.texts)
    left, right = theirs.transform(train.images[train.image_index], train.texts)
    np.testing.assert_allclose(ours, [np.corrcoef(left[:, k], right[:, k])[0, 1] for k in range(4)], atol=1e-3)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_leading_singular_vectors_are_those_of_the_full_decomposition(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    matrix[:, 3] = matrix[:, 4]  # one value is zero
    left, values, right = closed_form._leading(matrix, 7)
    np.testing.assert_allclose(values, np.linalg.svd(matrix, compute_uv=False)[:7])
    for vectors in (left, right):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(7), atol=1e-9)
    np.testing.assert_allclose(left.T @ matrix @ right, np.diag(values), atol=1e-9)
    assert len(closed_form._leading(matrix, 99)[1]) == 11 + (shape[0] < shape[1])


def test_ridge_predicts_what_scikit_learn_predicts(data, monkeypatch):
    train = data[0]
    monkeypatch.setattr(closed_form, "STRENGTHS", (0.1,))
    monkeypatch.setattr(closed_form, "unit_rows", lambda rows: rows)
    for settings, embed in ridge(train):
        known, wanted = (train.texts, train.images) if settings["onto"] == "image" else (train.images, train.texts)
        known, wanted = (
            (known, wanted[train.image_index]) if settings["onto"] == "image" else (known[train.image_index], wanted)
        )
        strength = 0.1 * np.linalg.eigvalsh(known.T @ known / len(known)).mean() * len(known)
        theirs = Ridge(alpha=strength, fit_intercept=False).fit(known, wanted)
        images, texts = embed(data[2])
        ours, asked = (texts, data[2].texts) if settings["onto"] == "image" else (images, data[2].images)
        np.testing.assert_allclose(ours, theirs.predict(asked), atol=1e-8)


@pytest.mark.parametrize("kind", ["text_knn", "image_knn"])
def test_neighbours_are_bridged_as_an_explicit_loop_does_it(data, kind, monkeypatch):
    train, _, test = data
    monkeypatch.setattr(baselines, "NEIGHBOURS", (1, 5))
    monkeypatch.setattr(baselines, "SHARPNESS", (0.1,))

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    for settings, embed in neighbours(train, kind):
        images, texts = embed(test)
        moved = texts if kind == "text_knn" else images
        for row in range(10):
            asked = unit((test.texts if kind == "text_knn" else test.images)[row])
            memory = unit(train.texts if kind == "text_knn" else train.images)
            scores = memory @ asked
            near = np.argsort(-scores)[: settings["neighbours"]]
            weights = np.exp((scores[near] - scores[near[0]]) / 0.1)
            if kind == "text_knn":
                carried = unit(train.images)[train.image_index[near]]
            else:
                carried = np.stack([unit(train.texts)[train.image_index == picture].mean(0) for picture in near])
            np.testing.assert_allclose(moved[row], unit(weights @ carried), atol=1e-5)


def test_the_bridge_holds_each_picture_once_however_many_captions_it_has():
    import tracemalloc

    generator = np.random.default_rng(0)
    train = Pairs(
        generator.standard_normal((100, 500)), generator.standard_normal((5000, 4)), np.repeat(np.arange(100), 50)
    )
    tracemalloc.start()
    _, embed = next(neighbours(train, "text_knn"))
    embed(Pairs(train.images[:5], train.texts[:5], np.arange(5)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < train.images.nbytes * 5  # a copy for each caption would be 50


@pytest.mark.parametrize("fit", [cca, ridge, lambda train: neighbours(train, "text_knn")], ids=["cca", "ridge", "knn"])
def test_what_was_planted_is_found_and_settings_are_chosen_on_the_selection_pairs(data, fit):
    train, selection, test = data
    scores = [quality(*embed(selection), selection.image_index)["rsum"] for _, embed in fit(train)]
    settings, embed = choose(fit(train), selection)
    assert settings["selection_rsum"] == round(max(scores), 1) > min(scores)
    assert quality(*embed(test), test.image_index)["text_to_image"]["R@1"] > 20  # chance: 1.25


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_random_maps_are_orthogonal_seeded_and_without_preferred_direction(shape):
    matrix = random_orthogonal(*shape, seed=1)
    gram = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=1e-12)
    np.testing.assert_array_equal(matrix, random_orthogonal(*shape, seed=1))
    corner = [random_orthogonal(*shape, seed=seed)[0, 0] for seed in range(200)]
    assert abs(np.mean(corner)) < 0.12


def test_unlearned_baselines_sit_at_chance_though_each_modality_is_well_structured():
    generator = np.random.default_rng(0)
    topics = generator.standard_normal((60, 12))
    images = topics @ generator.standard_normal((12, 40))
    index = np.repeat(np.arange(60), 2)
    texts = topics[index] @ generator.standard_normal((12, 20)) + 0.3 * generator.standard_normal((120, 20))
    found = {}
    for images_are_space in (True, False):
        pairs = unlearned(
            *((images, texts) if images_are_space else (texts, images)), index, images_are_space=images_are_space
        )
        assert len(pairs) == MAPS
        found[images_are_space] = report(pairs, draws=0)
        assert found[images_are_space]["text_to_image"]["R@1"] == pytest.approx(100 / 60, abs=1.5)
        assert found[images_are_space]["image_to_text"]["R@1"] == pytest.approx(100 / 60, abs=1.5)
        assert found[images_are_space]["text_to_image"]["R@1_sd"] > 0
    assert found[True] != found[False]


@pytest.mark.parametrize(("space_dim", "other_dim"), [(9, 5), (5, 9), (6, 6)])
def test_unlearned_ranks_are_those_of_the_features_carried_into_the_space(space_dim, other_dim):
    generator = np.random.default_rng(0)
    index = np.repeat(np.arange(30), 2)
    for images_are_space in (True, False):
        rows = (30, 60) if images_are_space else (60, 30)
        space, others = (generator.standard_normal((n, d)) for n, d in zip(rows, (space_dim, other_dim), strict=True))
        found = unlearned(space, others, index, images_are_space=images_are_space)
        for number, pair in enumerate(found):
            carried = others @ random_orthogonal(other_dim, space_dim, [0, images_are_space, number])
            both = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (space, carried)]
            sides = both if images_are_space else both[::-1]
            for one, expected in zip(pair, rank(*sides, index), strict=True):
                np.testing.assert_array_equal(one.above, expected.above)


def test_trap_zero_or_non_finite_features_raise_in_baselines():
    for value in (0.0, np.nan):
        bad = np.full((3, 4), value)
        with pytest.raises(MetricsError, match="have no direction"):
            unlearned(bad, np.ones((3, 4)), np.arange(3), images_are_space=True)


def test_trap_a_refit_whose_rank_has_grown_takes_the_nearest_dimensions():
    train, selection = (planted(seed, pictures, captions=1) for seed, pictures in ((0, 6), (1, 5)))
    sides = [(pairs.images, pairs.texts, pairs.image_index) for pairs in (train, selection)]
    settings, (chosen, again) = align(*sides, refit=True)
    assert (chosen.image_map.shape, again.image_map.shape) == ((12, 6), (12, 9))
    assert settings["dimensions"] == 6
    both = Pairs(*(np.concatenate(parts) for parts in zip(*(side[:2] for side in sides), strict=True)), np.arange(11))
    wanted = {"strength": settings["strength"], "power": settings["power"]}
    (expected,) = (maps for candidate, maps in cca(both) if wanted.items() <= candidate.items())
    np.testing.assert_array_equal(again.image_map, expected.image_map)
