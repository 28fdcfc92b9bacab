"""Corrections for hubs against their written-out definitions, and where they may be used."""

import types

import h5py
import numpy as np
import pytest
from scipy.stats import skew

from onceover.retrieval import hubness, metrics
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.hubness import (
    beta_of_spread,
    bias_by_bank,
    csls_bias,
    fit_inverted_softmax,
    hub_skewness,
    inherited_betas,
    inverted_softmax_bias,
)
from onceover.retrieval.index import Index, update
from onceover.retrieval.metrics import report
from onceover.retrieval.ranks import rank, rank_scores
from onceover.retrieval.search import Query, Searcher, Term


def unit(generator, rows, dim=16):
    vectors = generator.standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_inverted_softmax_is_a_bias(monkeypatch):
    """It ranks as exp(b s(q, g)) / sum over the bank of exp(b s(bank, g)) does (Smith et al. 2017)."""
    generator = np.random.default_rng(0)
    images, texts, bank, index = unit(generator, 30), unit(generator, 90), unit(generator, 200), np.arange(90) // 3
    beta = 7.0
    monkeypatch.setattr(hubness, "_BLOCK_BYTES", 4 * 200 * 7)  # uneven blocks
    bias = inverted_softmax_bias(images, bank, beta)
    inverted = np.exp(beta * images @ texts.T) / np.exp(beta * images @ bank.T).sum(1, keepdims=True)
    found, expected = rank(images, texts, index, image_bias=bias)[1], rank_scores(np.log(inverted), index)[1]
    np.testing.assert_array_equal(found.above, expected.above)


def test_csls_is_a_bias():
    """It ranks as 2 s(q, g) - r(q) - r(g) does, r the mean over ten neighbours (Conneau et al. 2018)."""
    generator = np.random.default_rng(1)
    images, texts, index = unit(generator, 40), unit(generator, 120), np.arange(120) // 3
    scores = (images @ texts.T).astype(np.float64)
    of_image, of_text = np.sort(scores, 1)[:, -10:].mean(1), np.sort(scores, 0)[-10:].mean(0)
    expected = rank_scores(2 * scores - of_image[:, None] - of_text, index)
    found = rank(images, texts, index, image_bias=csls_bias(images, texts), text_bias=csls_bias(texts, images))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.above, theirs.above)


def test_hub_skewness_is_that_of_the_ten_occurrences_and_a_correction_lowers_it():
    generator = np.random.default_rng(2)
    gallery, queries, bank = unit(generator, 80), unit(generator, 500), unit(generator, 500)
    for rows in (queries, bank):
        rows += 0.35 * gallery[3]  # everything is near one item
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    top = np.argsort(-queries @ gallery.T, axis=1)[:, :10]
    before = hub_skewness(gallery, queries)
    assert before == pytest.approx(skew(np.bincount(top.ravel(), minlength=80)))
    assert hub_skewness(gallery, queries, inverted_softmax_bias(gallery, bank, 10.0)) < before - 0.5
    assert hub_skewness(gallery[:5], queries) == 0.0  # all of them are found by every query


def test_an_item_whose_own_queries_are_the_whole_bank_has_their_bias():
    generator = np.random.default_rng(7)
    gallery, bank = unit(generator, 2), unit(generator, 3)
    images = (np.array([0, 1]), np.zeros(3, int))
    np.testing.assert_array_equal(
        inverted_softmax_bias(gallery, bank, 5.0, images), inverted_softmax_bias(gallery, bank, 5.0)
    )


def test_beta_is_chosen_on_the_selection_pictures_and_the_bank_is_of_train(monkeypatch):
    generator = np.random.default_rng(3)
    index = np.arange(300) // 3
    images = unit(generator, 100)
    texts = images[index] + 0.8 * unit(generator, 300)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    train, selection = np.arange(60), np.arange(60, 80)
    found = fit_inverted_softmax(images, texts, index, train, selection)
    before = found.bias("image")
    beta = found.betas["image"]
    np.testing.assert_allclose(before[60:], inverted_softmax_bias(images[60:], texts[:180], beta), rtol=1e-5)
    for image in range(60):  # to their own captions heads were fitted: these do not count
        others = texts[:180][index[:180] != image]
        bias = inverted_softmax_bias(images[image : image + 1], others, beta)
        np.testing.assert_allclose(before[image], bias[0], rtol=1e-5)
    bias = inverted_softmax_bias(texts[:3], images[1:60], found.betas["text"])
    np.testing.assert_allclose(found.bias("text")[:3], bias, rtol=1e-5)
    assert found.bias("text").shape == (300,)
    assert found.betas["image"] == beta_of_spread(images[60:80], texts[:180]) > 5
    assert found.betas["text"] == beta_of_spread(texts[180:240], images[:60]) > 5
    # nothing outside train and selection plays a part in what is chosen
    images[80:], texts[240:] = unit(generator, 20), unit(generator, 60)
    again = fit_inverted_softmax(images, texts, index, train, selection)
    assert again.betas == found.betas
    np.testing.assert_array_equal(again.bias("image")[:80], before[:80])
    monkeypatch.setattr(hubness, "BANK", 50)
    other = fit_inverted_softmax(images, texts, index, train, selection)
    assert not np.array_equal(other.bias("image"), again.bias("image"))
    rows = hubness.bank_rows(np.arange(1000))
    assert len(rows) == 50 == len(np.unique(rows))
    np.testing.assert_array_equal(rows, hubness.bank_rows(np.arange(1000)))


def test_the_file_holds_the_biases_that_any_gallery_would_get(run_dir, store):
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    is_new = np.array(embeddings.splits) != "train"
    bias = bias_by_bank(embeddings, "image", embeddings.images)
    np.testing.assert_allclose(bias[is_new], embeddings.image_bias[is_new], rtol=1e-5)
    is_equal = np.isclose(bias[~is_new], embeddings.image_bias[~is_new])
    assert not is_equal.any(), "train images' own captions do not count"
    is_new = is_new[embeddings.image_index]
    bias = bias_by_bank(embeddings, "text", embeddings.texts)
    np.testing.assert_allclose(bias[is_new], embeddings.text_bias[is_new], rtol=1e-5)
    with h5py.File(run_dir / "embeddings.h5", locking=False) as file:
        for kind in ("image", "text"):
            assert file[f"{kind}/bias"].attrs["beta"] == embeddings.betas[kind]
            assert np.any(file[f"{kind}/bias"][:]) == (embeddings.betas[kind] > 0)


def test_the_beta_of_spread_is_two_divided_by_the_deviation_of_an_items_scores(monkeypatch):
    generator = np.random.default_rng(4)
    gallery, bank = unit(generator, 50), unit(generator, 400)
    expected = 2 / np.sqrt((gallery @ bank.T).var(axis=1).mean())
    monkeypatch.setattr(hubness, "_BLOCK_BYTES", 4 * 400 * 7)  # uneven blocks
    assert beta_of_spread(gallery, bank) == round(float(expected), 1) == 8.0
    near = gallery[:1] + 0.1 * unit(generator, 400)  # scores that lie close together
    assert beta_of_spread(near[:50], near) > 50
    for row in bank[:5]:
        assert beta_of_spread(gallery, np.repeat(row[None], 10_000, axis=0)) == hubness.NO_CORRECTION  # all are equal
    monkeypatch.setattr(hubness, "MIN_BANK", 401)
    assert beta_of_spread(gallery, bank) == hubness.NO_CORRECTION


def test_where_next_to_nothing_was_learned_nothing_is_corrected(monkeypatch):
    monkeypatch.setattr(hubness, "is_mostly_noise", metrics.is_mostly_noise)
    generator = np.random.default_rng(5)
    index = np.arange(800)
    images = unit(generator, 800)
    hub = 1.5 * images[:1]
    texts = unit(generator, 800) + hub  # all captions are near one image, and tell nothing else
    learned = images + hub
    train, validation = np.arange(300), np.arange(300, 800)
    for captions, is_corrected in ((texts, False), (learned, True)):
        units = captions / np.linalg.norm(captions, axis=1, keepdims=True)
        found = fit_inverted_softmax(images, units, index, train, validation)
        assert (found.betas["image"] > 0) == is_corrected


def test_a_correction_stands_unless_it_ranks_the_validation_pairs_clearly_worse():
    generator = np.random.default_rng(4)
    index = np.arange(400)
    images = unit(generator, 400)
    texts = images + 0.6 * unit(generator, 400)
    texts[:300] += 0.9 * unit(generator, 1)  # many train captions are near some images, which are no hubs for others
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    train, selection = np.arange(300), np.arange(300, 400)
    harmed = fit_inverted_softmax(images, texts, index, train, selection)
    assert harmed.betas["image"] == hubness.NO_CORRECTION
    np.testing.assert_array_equal(harmed.bias("image"), np.zeros(400, np.float32))
    # where every text is near one image, correcting is clearly better
    texts += 1.5 * images[300]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    helped = fit_inverted_softmax(images, texts, index, train, selection)
    assert helped.betas["image"] > 0
    ranked = [rank(images[300:], texts[300:], np.arange(100), image_bias=helped.bias("image")[300:])]
    assert report(ranked, draws=0)["rsum"] > report([rank(images[300:], texts[300:], np.arange(100))], draws=0)["rsum"]


def test_an_image_among_images_meets_no_bias_and_a_mixed_query_its_share(run_dir):
    """The biases are measured with queries of the other kind."""
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    embedder = types.SimpleNamespace(space=embeddings.space, embed_texts=lambda _: embeddings.texts[:1])
    gallery = embeddings.gallery("image", rerank="qbnorm")
    name = embeddings.ids[0]
    corrected = Searcher(gallery, embedder)
    for hit in corrected.search(Query((Term(item=name),)), 5):
        row = embeddings.ids.index(hit.id)
        assert hit.score == pytest.approx(float(embeddings.images[0] @ embeddings.images[row]), abs=1e-6)
    mixed = Query((Term(item=name, weight=1.0), Term(text="a", weight=3.0)))
    vector = embeddings.images[0] + 3 * embeddings.texts[0]
    vector /= np.linalg.norm(vector)
    for hit in corrected.search(mixed, 5):
        row = embeddings.ids.index(hit.id)
        expected = float(vector @ embeddings.images[row]) + 0.75 * float(embeddings.image_bias[row])
        assert hit.score == pytest.approx(expected, abs=1e-5)


def test_heads_made_of_others_are_corrected_by_their_own_spread_or_like_them_not_at_all():
    generator = np.random.default_rng(6)
    images, texts = unit(generator, 60), unit(generator, 60)
    betas = inherited_betas({"image": 10.0, "text": 20.0}, {"image": 12.0, "text": hubness.NO_CORRECTION})
    found = fit_inverted_softmax(images, texts, np.arange(60), np.arange(60), np.arange(50, 60), betas)
    assert found.betas == {"image": beta_of_spread(images[50:], texts), "text": hubness.NO_CORRECTION}
    assert found.betas["image"] > 0


def test_what_is_searched_with_is_what_is_reported(run_dir, tmp_path):
    """R@5 counted from a Searcher's hits, in memory and from an index, is the R@5 of the row in the table."""
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    pictures, captions, index = embeddings.split("train")
    embedder = types.SimpleNamespace(
        space=embeddings.space, embed_texts=lambda rows: embeddings.texts[list(map(int, rows))]
    )
    found = {}
    for rerank in ("none", "qbnorm"):
        biases = {
            name: bias[captions if name == "text_bias" else pictures]
            for name, bias in embeddings.biases(rerank).items()
        }
        told = report([rank(embeddings.images[pictures], embeddings.texts[captions], index, **biases)], draws=0)
        gallery = embeddings.gallery("image", "train", rerank)
        probes = np.column_stack([embeddings.texts[captions], np.ones(len(captions), np.float32)])
        probes = probes if gallery.biased else probes[:, :-1]
        update(tmp_path / rerank, gallery, probes, source="s", run="r", memory=2**30)
        for searched in (gallery, Index(tmp_path / rerank)):
            hits = Searcher(searched, embedder).search_many([str(row) for row in captions], 5)
            ids = [[hit.id for hit in some] for some in hits]
            hit = [embeddings.ids[pictures[of]] in some for of, some in zip(index, ids, strict=True)]
            assert 100 * np.mean(hit) == pytest.approx(told["text_to_image"]["R@5"])
        found[rerank] = ids
    assert found["none"] != found["qbnorm"]
