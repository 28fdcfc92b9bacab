"""Baselines against independent implementations and explicit loops, on planted data."""

import numpy as np
import pytest
import torch
from sklearn import cross_decomposition, linear_model

from onceover.heads.models import Standardize
from onceover.retrieval import baselines, closed_form, neighbours
from onceover.retrieval.baselines import MAPS, Pairs, choose, standardised, unit_rows, unlearned
from onceover.retrieval.closed_form import CCA, DIMENSIONS, POWERS, STRENGTHS, Moments, Ridge, align
from onceover.retrieval.metrics import quality, report
from onceover.retrieval.neighbours import NEIGHBOURS, SHARPNESS, Bridge
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


def few(pairs, images):
    """The first images of pairs, with one caption each."""
    return Pairs(pairs.images[:images], pairs.texts[: 2 * images : 2], np.arange(images))


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
    for pairs in (data[0], few(data[0], 5)):  # more captions and images than dimensions, and fewer
        moments = Moments.of(pairs)
        images = pairs.images[pairs.image_index]
        count = len(pairs.texts)
        for spectrum, rows in ((moments.image, images), (moments.text, pairs.texts)):
            np.testing.assert_allclose(
                spectrum.basis * spectrum.values @ spectrum.basis.T, rows.T @ rows / count, atol=1e-10
            )
            np.testing.assert_allclose(spectrum.mean, (rows**2).sum() / count / rows.shape[1])
            assert spectrum.basis.shape[1] == min(rows.shape[1], len(pairs.images) if rows is images else count)
        found = moments.image.basis @ moments.cross @ moments.text.basis.T
        np.testing.assert_allclose(found, images.T @ pairs.texts / count, atol=1e-10)


def test_cca_finds_the_canonical_correlations_that_scikit_learn_finds(data, monkeypatch):
    train = data[0]
    monkeypatch.setattr(closed_form, "STRENGTHS", (1e-9,))
    monkeypatch.setattr(closed_form, "DIMENSIONS", (4,))
    monkeypatch.setattr(closed_form, "POWERS", (0,))
    monkeypatch.setattr(closed_form, "unit_rows", lambda rows: rows)
    family = CCA(Moments.of(train))
    pairs = Pairs(train.images[train.image_index], train.texts, np.arange(600))
    ((settings, *candidate),) = family.candidates(pairs)
    assert settings == {"strength": 1e-9, "dimensions": 4, "power": 0}
    images, texts = family.fit(settings)(pairs)
    np.testing.assert_allclose(candidate[0], images, atol=1e-10)
    ours = [np.corrcoef(images[:, k], texts[:, k])[0, 1] for k in range(4)]
    theirs = cross_decomposition.CCA(4, max_iter=5000, tol=1e-12).fit(train.images[train.image_index], train.texts)
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
    family = Ridge(Moments.of(train))
    for candidate in family.candidates(data[2]):
        settings = candidate.settings
        known, wanted = (train.texts, train.images) if settings["onto"] == "image" else (train.images, train.texts)
        known, wanted = (
            (known, wanted[train.image_index]) if settings["onto"] == "image" else (known[train.image_index], wanted)
        )
        strength = 0.1 * np.linalg.eigvalsh(known.T @ known / len(known)).mean() * len(known)
        theirs = linear_model.Ridge(alpha=strength, fit_intercept=False).fit(known, wanted)
        images, texts = family.fit(settings)(data[2])
        ours, asked = (texts, data[2].texts) if settings["onto"] == "image" else (images, data[2].images)
        np.testing.assert_allclose(ours, theirs.predict(asked), atol=1e-8)


@pytest.mark.parametrize("kind", ["text_knn", "image_knn"])
def test_neighbours_are_bridged_as_an_explicit_loop_does_it(data, kind, monkeypatch):
    train, _, test = data
    monkeypatch.setattr(neighbours, "NEIGHBOURS", (1, 5))
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 8 * len(train.images) * 5)  # columns at a time
    monkeypatch.setattr(neighbours, "SHARPNESS", (0.1,))

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    family = Bridge(train, moves_texts=kind == "text_knn")
    for settings, *candidate in family.candidates(test):
        images, texts = family.fit(settings)(test)
        np.testing.assert_allclose(candidate[0], images, atol=1e-12)
        np.testing.assert_allclose(candidate[1], texts, atol=1e-12)
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
    family = Bridge(train, moves_texts=True)
    family.fit({"neighbours": 3, "sharpness": 0.1})(Pairs(train.images[:5], train.texts[:5], np.arange(5)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < train.images.nbytes * 5  # a copy for each caption would be 50


FAMILIES = {
    "cca": lambda train: CCA(Moments.of(train)),
    "ridge": lambda train: Ridge(Moments.of(train)),
    "text_knn": lambda train: Bridge(train, moves_texts=True),
    "image_knn": lambda train: Bridge(train, moves_texts=False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_planted_is_found_and_settings_are_chosen_on_the_selection_pairs(data, name):
    train, selection, test = data
    family = FAMILIES[name](train)
    scores = []
    for candidate in family.candidates(selection):
        scores.append(quality(candidate.images, candidate.texts, selection.image_index)["rsum"])
    settings = choose(family, selection)
    assert settings["selection_rsum"] == round(max(scores), 1)
    assert quality(*family.fit(settings)(test), test.image_index)["text_to_image"]["R@1"] > 20  # chance: 1.25


def explicit(name, train):
    """The settings of a baseline with its function, each computed for itself; the reference for what shares work."""
    images = train.images[train.image_index]
    count = len(images)
    of_images, of_texts = images.T @ images / count, train.texts.T @ train.texts / count
    of_both = images.T @ train.texts / count

    def inverse_root(moments, strength):
        values, vectors = np.linalg.eigh(moments + strength * moments.trace() / len(moments) * np.eye(len(moments)))
        return vectors / np.sqrt(values) @ vectors.T

    def solved(moments, strength, cross):
        return np.linalg.solve(moments + strength * moments.trace() / len(moments) * np.eye(len(moments)), cross)

    if name == "cca":
        for strength in STRENGTHS:
            left, values, right = np.linalg.svd(
                inverse_root(of_images, strength) @ of_both @ inverse_root(of_texts, strength)
            )
            rank_of = int((values > 1e-6 * values[0]).sum())
            for dimensions in sorted({min(wanted, rank_of) for wanted in DIMENSIONS}):
                for power in POWERS:
                    weights = values[:dimensions] ** power
                    image_map = inverse_root(of_images, strength) @ left[:, :dimensions] * weights
                    text_map = inverse_root(of_texts, strength) @ right[:dimensions].T * weights
                    yield (
                        {"strength": strength, "dimensions": dimensions, "power": power},
                        lambda pairs, left=image_map, right=text_map: (pairs.images @ left, pairs.texts @ right),
                    )
    if name == "ridge":
        for strength in STRENGTHS:
            mapping = solved(of_texts, strength, of_both.T)
            yield {"onto": "image", "strength": strength}, lambda pairs, m=mapping: (pairs.images, pairs.texts @ m)
        for strength in STRENGTHS:
            mapping = solved(of_images, strength, of_both)
            yield {"onto": "text", "strength": strength}, lambda pairs, m=mapping: (pairs.images @ m, pairs.texts)
    if name.endswith("knn"):
        moves_texts = name == "text_knn"
        memory, values = unit_rows(train.texts), unit_rows(train.images)[train.image_index]
        if not moves_texts:
            memory = unit_rows(train.images)
            values = np.stack(
                [unit_rows(train.texts)[train.image_index == image].mean(0) for image in range(len(memory))]
            )

        def moved(queries, neighbours, sharpness):
            scores = (unit_rows(queries).astype(np.float32) @ memory.astype(np.float32).T).astype(float)
            rows = []
            for own in scores:
                near = np.argsort(-own, kind="stable")[:neighbours]
                weights = np.exp((own[near] - own[near[0]]) / sharpness)
                rows.append(weights @ values[near])
            return np.stack(rows)

        for neighbours in sorted({min(number, len(memory)) for number in NEIGHBOURS}):
            for sharpness in SHARPNESS if neighbours > 1 else SHARPNESS[:1]:
                settings = {"neighbours": neighbours, "sharpness": sharpness}
                if moves_texts:
                    yield settings, lambda pairs, s=settings: (pairs.images, moved(pairs.texts, **s))
                else:
                    yield settings, lambda pairs, s=settings: (moved(pairs.images, **s), pairs.texts)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("images", [300, 9])  # more than dimensions, and fewer
def test_shared_work_chooses_the_settings_that_explicit_work_chooses(name, images):
    train, selection = standardised(planted(0, images, noise=1.5), planted(1, 60, noise=1.5))
    expected = {}
    for settings, embed in explicit(name, train):
        vectors = (unit_rows(rows) for rows in embed(selection))
        expected[tuple(settings.items())] = quality(*vectors, selection.image_index)["rsum"]
    family = FAMILIES[name](train)
    found = {}
    for candidate in family.candidates(selection):
        rsum = quality(candidate.images, candidate.texts, selection.image_index)["rsum"]
        found[tuple(candidate.settings.items())] = rsum
    assert found == pytest.approx(expected, abs=1e-9)
    best = max(expected.values())
    wanted = next(settings for settings, rsum in sorted(expected.items()) if rsum == pytest.approx(best, abs=1e-9))
    assert choose(family, selection) == dict(wanted) | {"selection_rsum": round(best, 1)}


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
            generator = np.random.default_rng([0, images_are_space, number])
            if space_dim > other_dim:  # the chosen coordinates of the space are where the others go
                carried = others @ baselines._signed_choice(np.eye(space_dim), other_dim, generator).T
            else:
                carried = others @ baselines._signed_choice(np.eye(other_dim), space_dim, generator)
            both = [unit_rows(space), unit_rows(carried)]
            sides = both if images_are_space else both[::-1]
            for one, expected in zip(pair, rank(*sides, index), strict=True):
                np.testing.assert_array_equal(one.above, expected.above)


def test_a_signed_choice_takes_each_coordinate_at_most_once_and_evenly():
    generator = np.random.default_rng(0)
    total = np.zeros((9, 5))
    for _ in range(500):
        matrix = baselines._signed_choice(np.eye(9), 5, generator)
        np.testing.assert_array_equal(matrix.T @ matrix, np.eye(5))
        total += np.abs(matrix)
        assert set(np.unique(matrix)) <= {-1, 0, 1}
    assert np.abs(total / 500 - 1 / 9).max() < 0.05


def test_a_row_whose_chosen_coordinates_are_all_zero_scores_the_same_with_everything():
    texts = np.zeros((4, 8))
    texts[:, 0] = 1  # mostly not among the two that are chosen
    pairs = unlearned(np.random.default_rng(0).standard_normal((4, 2)), texts, np.arange(4), images_are_space=True)
    assert any((to_image.level == 4).all() for _, to_image in pairs)


def test_trap_zero_or_non_finite_features_raise_in_baselines():
    for value in (0.0, np.nan):
        bad = np.full((3, 4), value)
        with pytest.raises(MetricsError, match="have no direction"):
            unlearned(bad, np.ones((3, 4)), np.arange(3), images_are_space=True)


def test_a_refit_has_the_settings_that_were_chosen():
    train, selection = (planted(seed, pictures, captions=1) for seed, pictures in ((0, 6), (1, 5)))
    sides = [(pairs.images, pairs.texts, pairs.image_index) for pairs in (train, selection)]
    settings, chosen, fit_both = align(*sides)
    again = fit_both()
    assert settings["dimensions"] == 6  # as many as six images have
    assert (chosen.image_map.shape, again.image_map.shape) == ((12, 6), (12, 6))
    both = closed_form.joined(train, selection)
    np.testing.assert_array_equal(both.image_index, np.arange(11))
    np.testing.assert_array_equal(again.image_map, CCA(Moments.of(both)).fit(settings).image_map)
