"""Metrics against a slow full-matrix reference, an independent public implementation, and the traps of the field."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from onceover.retrieval import ranks as module
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.metrics import clearly_best, compare, report, separation
from onceover.retrieval.ranks import MetricsError, Ranks, chance, rank, rank_scores


def unit(generator, rows, dim):
    vectors = generator.standard_normal((rows, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def slow(scores: np.ndarray, positives: list[list[int]], k: int) -> tuple[list[float], ...]:
    """Hit@k, true recall@k, rank and 1/rank of the first correct item, averaged over every order of tied items."""
    hits, recalls, places, reciprocals = [], [], [], []
    for row, correct in zip(scores, positives, strict=True):
        if not correct:
            continue
        first, shares = [], []
        for order in itertools.permutations(range(len(row))):
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order)):
                first.append(1 + min(order.index(item) for item in correct))
                shares.append(np.mean([order.index(item) < k for item in correct]))
        hits.append(np.mean([place <= k for place in first]))
        recalls.append(np.mean(shares))
        places.append(np.mean(first))
        reciprocals.append(np.mean([1 / place for place in first]))
    return hits, recalls, places, reciprocals


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_ties_uneven_captions_and_all_numbers_match_every_order_written_out(seed, n_images, n_texts, levels):
    generator = np.random.default_rng(seed)
    scores = generator.integers(levels, size=(n_images, n_texts)).astype(float)  # few levels: many ties
    index = generator.integers(n_images, size=n_texts)  # any number of captions an image, none among them
    to_text, to_image = rank_scores(scores, index)
    for found, matrix, positives in (
        (to_text, scores, [np.flatnonzero(index == image).tolist() for image in range(n_images)]),
        (to_image, scores.T, [[image] for image in index]),
    ):
        for k in (1, 2, 5, 100):
            hits, recalls, places, reciprocals = slow(matrix, positives, k)
            np.testing.assert_allclose(found.hit_at(k), hits, atol=1e-12)
            np.testing.assert_allclose(found.true_recall_at(k), recalls, atol=1e-12)
        np.testing.assert_allclose(found.expected_rank(), places)
        np.testing.assert_allclose(found.expected_reciprocal_rank(), reciprocals)


def agrees_with_torchmetrics(images, texts, index):
    """Hits, true recalls and reciprocal ranks, query by query, against torchmetrics."""
    from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_recall, retrieval_reciprocal_rank

    scores = torch.from_numpy(images.astype(np.float64) @ texts.astype(np.float64).T)
    truth = torch.from_numpy(index)[None] == torch.arange(len(images))[:, None]
    asked = truth.any(1)
    to_text, to_image = rank(images, texts, index)
    for found, matrix, target in ((to_text, scores[asked], truth[asked]), (to_image, scores.T, truth.T)):
        # torchmetrics leaves out hits with scores <= 0; shifting changes no rank
        shifted = matrix + 2
        for k in (1, 5, 10):
            theirs = [float(retrieval_hit_rate(s, t, top_k=k)) for s, t in zip(shifted, target, strict=True)]
            assert found.hit_at(k).tolist() == theirs
            theirs = [float(retrieval_recall(s, t, top_k=k)) for s, t in zip(shifted, target, strict=True)]
            np.testing.assert_allclose(found.true_recall_at(k), theirs, rtol=1e-7)  # theirs is float32
        theirs = [float(retrieval_reciprocal_rank(s.float(), t)) for s, t in zip(shifted, target, strict=True)]
        np.testing.assert_allclose(found.expected_reciprocal_rank(), theirs, rtol=1e-6)


def test_tie_free_numbers_agree_with_torchmetrics_to_the_last_digit():
    generator = np.random.default_rng(0)
    agrees_with_torchmetrics(unit(generator, 40, 16), unit(generator, 130, 16), generator.integers(40, size=130))


def test_numbers_of_a_fitted_run_agree_with_torchmetrics_to_the_last_digit(run_dir):
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    pictures, captions, index = embeddings.split("train")
    # drawn captions repeat, and equal ones tie; what torchmetrics does with ties is not specified
    _, first = np.unique(np.round(embeddings.texts[captions], 5), axis=0, return_index=True)
    agrees_with_torchmetrics(embeddings.images[pictures], embeddings.texts[captions][first], index[first])


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-9, 1e-7, 1e-5]))
@settings(max_examples=40, deadline=None)
def test_what_float32_cannot_order_is_ordered_as_in_float64(seed, distance):
    generator = np.random.default_rng(seed)
    images = unit(generator, 6, 16)[generator.integers(6, size=24)] + distance * generator.standard_normal((24, 16))
    texts = unit(generator, 9, 16)[generator.integers(9, size=60)] + distance * generator.standard_normal((60, 16))
    index = generator.integers(24, size=60)
    scores = images @ texts.T
    own, tie = scores[index, np.arange(60)], 1e-12
    gaps = np.abs(np.concatenate([(scores - own).ravel(), (scores[index] - own[:, None]).ravel()]))
    assume(not ((gaps > 0.2 * tie) & (gaps < 5 * tie)).any())  # on the edge of what counts as a tie
    to_text, to_image = rank(images, texts, index)
    np.testing.assert_array_equal(to_image.above, (scores > own + tie).sum(0))
    np.testing.assert_array_equal(to_image.level, (np.abs(scores - own) <= tie).sum(0))
    np.testing.assert_array_equal(to_text.above, (scores[index] > own[:, None] + tie).sum(1))
    np.testing.assert_array_equal(to_text.level, (np.abs(scores[index] - own[:, None]) <= tie).sum(1))


def test_biases_count_where_their_item_is_searched_for():
    generator = np.random.default_rng(4)
    images, texts, index = unit(generator, 20, 8), unit(generator, 70, 8), generator.integers(20, size=70)
    image_bias, text_bias = generator.standard_normal(20), generator.standard_normal(70)
    to_text, to_image = rank(images, texts, index, image_bias=image_bias, text_bias=text_bias)
    expected = (
        rank_scores(images @ texts.T + text_bias, index)[0],
        rank_scores(images @ texts.T + image_bias[:, None], index)[1],
    )
    for found, wanted in ((to_text, expected[0]), (to_image, expected[1])):
        np.testing.assert_array_equal(found.above, wanted.above)
        np.testing.assert_array_equal(found.level, wanted.level)
    with pytest.raises(MetricsError, match="not one finite number for each item"):
        rank(images, texts, index, image_bias=image_bias[:5])


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e30, 1e200])
def test_embeddings_of_any_scale_rank_alike(factor):
    generator = np.random.default_rng(5)
    images, texts, index = unit(generator, 12, 8), unit(generator, 30, 8), generator.integers(12, size=30)
    for found, wanted in zip(rank(images * factor, texts / factor, index), rank(images, texts, index), strict=True):
        np.testing.assert_array_equal(found.above, wanted.above)


def test_a_block_of_scores_stays_within_the_memory_it_was_given():
    import tracemalloc

    generator = np.random.default_rng(6)
    images, texts = (unit(generator, rows, 16).astype(np.float32) for rows in (600, 3000))
    index = np.arange(3000) // 5
    peaks = []
    for memory in (2**20, 2**24):
        tracemalloc.start()
        rank(images, texts, index, memory=memory)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 2**20 + 2**20  # the counts of 3,000 captions beside the block
    assert peaks[1] > 4 * 2**20  # else the test would not notice


def test_a_comparison_is_paired_and_calls_a_tie_a_tie():
    generator = np.random.default_rng(7)
    images, index = unit(generator, 200, 16), np.repeat(np.arange(200), 3)
    texts = images[index] + 1.2 * unit(generator, 600, 16)
    worse = texts + 0.9 * unit(generator, 600, 16)
    good, bad = rank(images, texts, index), rank(images, worse, index)
    difference = compare([bad], [good])
    alone = report([good], draws=0), report([bad], draws=0)
    for direction in ("image_to_text", "text_to_image"):
        for key in ("R@1", "R@10", "mrr", "mean_rank"):
            assert difference[direction][key] == pytest.approx(alone[0][direction][key] - alone[1][direction][key])
    assert difference["rsum"] == pytest.approx(alone[0]["rsum"] - alone[1]["rsum"])
    low, high = difference["text_to_image"]["R@1_ci"]
    assert 0 < low < difference["text_to_image"]["R@1"] < high
    # an explicit bootstrap of the images
    gain = good[1].hit_at(1) - bad[1].hit_at(1)
    per_picture = 100 * gain.reshape(200, 3).mean(1)
    drawn = [per_picture[generator.integers(200, size=200)].mean() for _ in range(4000)]
    np.testing.assert_allclose([low, high], np.percentile(drawn, [2.5, 97.5]), atol=0.6)
    same = compare([good], [good])
    assert (same["rsum"], same["rsum_ci"]) == (0.0, [0.0, 0.0])
    seeds = compare([bad, good], [good, good])  # a model's seeds count as their mean
    assert seeds["rsum"] == pytest.approx(difference["rsum"] / 2)
    assert seeds["rsum_ci"] == pytest.approx([bound / 2 for bound in difference["rsum_ci"]])
    with pytest.raises(MetricsError, match="cannot be paired"):
        compare([good], [rank(images[:100], texts[:300], index[:300])])


def test_trap_scores_at_or_below_zero_count():
    to_text, to_image = rank_scores(np.array([[-0.1, -0.9], [-0.8, -0.2]]), np.array([0, 1]))
    assert to_text.hit_at(1).tolist() == to_image.hit_at(1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["image", "text"])
def test_trap_embeddings_that_are_not_finite_raise(bad, which):
    generator = np.random.default_rng(0)
    images, texts = unit(generator, 4, 3), unit(generator, 8, 3)
    (images if which == "image" else texts)[1, 2] = bad
    with pytest.raises(MetricsError, match=f"1 {which} embeddings are not finite"):
        rank(images, texts, np.arange(8) // 2)
    with pytest.raises(MetricsError, match="not all finite"):
        rank_scores(np.full((2, 2), bad), np.arange(2))


@pytest.mark.parametrize("dim", [3, 64, 512])
def test_trap_a_collapsed_model_scores_exactly_chance(dim):
    vector = np.random.default_rng(1).standard_normal(dim).astype(np.float32)
    vector /= np.linalg.norm(vector)
    index = np.repeat(np.arange(30), 5)
    collapsed = rank(np.tile(vector, (30, 1)), np.tile(vector, (150, 1)), index)
    for found, expected in zip(collapsed, chance(30, index), strict=True):
        for k in (1, 5, 10, 31):
            np.testing.assert_allclose(found.hit_at(k), expected.hit_at(k))
        np.testing.assert_allclose(found.expected_rank(), expected.expected_rank())
    assert chance(30, index)[1].hit_at(1)[0] == pytest.approx(1 / 30)
    assert chance(30, index)[0].hit_at(1)[0] == pytest.approx(5 / 150)


def test_trap_recall_is_the_same_when_rows_are_permuted_or_a_constant_is_added():
    generator = np.random.default_rng(2)
    scores = np.round(generator.standard_normal((12, 40)), 1)
    index = generator.integers(12, size=40)
    before = report([rank_scores(scores, index)], draws=0)
    assert report([rank_scores(scores + 3.5, index)], draws=0) == before
    rows, columns = generator.permutation(12), generator.permutation(40)
    moved = np.argsort(rows)[index[columns]]
    after = report([rank_scores(scores[rows][:, columns], moved)], draws=0)
    for direction in ("image_to_text", "text_to_image"):
        assert after[direction] == pytest.approx(before[direction])


def test_trap_captions_are_matched_by_the_map_not_by_position():
    index = np.repeat(np.arange(10), 5)
    eye = np.eye(10)
    perfect = report([rank(eye, eye[index], index)], draws=0)
    assert perfect["image_to_text"]["R@1"] == perfect["text_to_image"]["R@1"] == 100.0
    assert perfect["rsum"] == 600.0


def test_trap_k_larger_than_the_gallery_is_well_defined():
    generator = np.random.default_rng(0)
    to_text, to_image = rank(unit(generator, 3, 4), unit(generator, 4, 4), np.array([0, 1, 2, 2]))
    assert to_text.hit_at(10**9).tolist() == [1.0] * 3
    assert to_image.hit_at(10).tolist() == [1.0] * 4


def test_a_picture_without_captions_is_a_distractor_and_no_query():
    images = np.eye(3)
    to_text, to_image = rank(images, images[[0, 2]], np.array([0, 2]))
    assert to_text.group.tolist() == [0, 2]
    assert (to_image.gallery, to_text.gallery) == (3, 2)


def test_blocks_of_any_size_and_half_precision_give_the_same_ranks(monkeypatch):
    generator = np.random.default_rng(3)
    images, texts = (unit(generator, rows, 32).astype(np.float16) for rows in (37, 90))
    index = generator.integers(37, size=90)
    whole = rank_scores(images.astype(float) @ texts.astype(float).T, index)
    for rows in (1, 5, 36, 37, 38):
        monkeypatch.setattr(module, "_BLOCK_ROWS", rows)
        for found, expected in zip(rank(images, texts, index), whole, strict=True):
            for name in ("query", "above", "level", "group", "greater", "tied", "correct"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("images", "texts", "index", "message"),
    [
        ((3, 4), (5, 5), 5, "shapes do not fit"),
        ((3, 4), (5, 4), 4, "shapes do not fit"),
        ((0, 4), (5, 4), 5, "nothing to rank"),
    ],
)
def test_shapes_that_do_not_fit_are_named(images, texts, index, message):
    with pytest.raises(MetricsError, match=message):
        rank(np.ones(images), np.ones(texts), np.zeros(index, int))


@pytest.mark.parametrize("index", [[0, 3], [-1, 0]])
def test_a_map_that_points_outside_is_named(index):
    with pytest.raises(MetricsError, match="points outside"):
        rank(np.eye(3), np.eye(3)[:2], np.array(index))


def test_intervals_resample_pictures_with_their_captions():
    hits = np.repeat(np.arange(100) % 2, 5)  # every caption of an image hits or misses together
    found = Ranks(np.arange(500), 1 - hits, np.ones(500, int), 100, np.repeat(np.arange(100), 5))
    low, high = report([(found, found)])["text_to_image"]["R@1_ci"]
    assert 50 - low == pytest.approx(9.8, abs=1.2)  # 1.96 * sqrt(.25 / 100), not sqrt(.25 / 500)
    assert high - 50 == pytest.approx(9.8, abs=1.2)
    assert report([(found, found)]) == report([(found, found)])


def test_several_rankings_are_averaged_with_their_spread():
    def ranks(greater):
        return Ranks(np.arange(10), np.full(10, greater), np.ones(10, int), 50, np.arange(10))

    found = report([(ranks(0), ranks(0)), (ranks(20), ranks(20))], draws=0)
    summary = found["image_to_text"]
    assert (summary["R@1"], summary["median_rank"]) == (50.0, 11.0)
    assert summary["R@1_sd"] == pytest.approx(np.std([0, 100], ddof=1))
    assert found["rsum_sd"] == pytest.approx(np.std([0, 600], ddof=1))


def test_separation_is_the_area_under_the_curve_of_each_captions_scores():
    generator = np.random.default_rng(0)
    images = unit(generator, 30, 4)
    texts = images[np.arange(60) // 2] + unit(generator, 60, 4)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    pair = rank(images, texts, np.arange(60) // 2)
    areas = []
    for caption, scores in enumerate(texts @ images.T):
        areas.append(roc_auc_score(np.arange(30) == caption // 2, scores))
    assert separation(pair) == pytest.approx(np.mean(areas))
    assert separation(rank(images[:1], texts[:2], np.zeros(2, int))) == 1.0, "there is no other image"


def test_the_median_rank_of_chance_is_that_of_all_orders():
    index = np.array([0, 0, 0, 1, 1, 2])
    to_text, to_image = chance(3, index)
    orders = list(itertools.permutations(range(6)))
    first = [
        min(order.index(text) for text in np.flatnonzero(index == image)) + 1 for image in range(3) for order in orders
    ]
    assert to_text.median_rank() == np.median(first) == 2.0
    assert to_text.expected_rank().mean() > 2.1  # which the median is not
    assert to_image.median_rank() == 2.0
    assert chance(1000, np.repeat(np.arange(1000), 5))[0].median_rank() == 647.0
    assert chance(2, np.arange(2))[0].median_rank() == 1.5  # as the median of an even number of ranks


@pytest.mark.parametrize(("lost", "chosen"), [(0, 0.4), (2, 0.4), (3, 0.1)])
def test_another_setting_is_taken_where_it_is_better_by_one_and_a_half_standard_errors(lost, chosen):
    """Of 100 images two that are found by one setting alone are 1.4 standard errors, three are 1.8."""
    index = np.arange(100)
    scores = np.eye(100) + 1e-3 * np.random.default_rng(0).random((100, 100))
    usual = scores.copy()
    usual[index[:lost], index[:lost]] = -1
    assert clearly_best({0.1: rank_scores(scores, index), 0.4: rank_scores(usual, index)}, 0.4) == chosen
