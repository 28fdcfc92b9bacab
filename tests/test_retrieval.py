"""Embeddings files, baselines, evaluation tables and search."""

import json
import shutil

import h5py
import numpy as np
import pytest

from retrieval import evaluation
from retrieval.baselines import MAPS, random_orthogonal, unlearned
from retrieval.embeddings import EmbeddingsError, read_embeddings
from retrieval.evaluation import EvaluationError, csv_table, evaluate, markdown_table, notes, terminal_table
from retrieval.index import exact_search
from retrieval.metrics import MetricsError, report
from retrieval.search import Searcher, SearchError, check_query


@pytest.fixture
def embeddings(run_dir):
    return read_embeddings(run_dir / "embeddings.h5")


@pytest.fixture
def broken(run_dir, tmp_path):
    """A copy of the embeddings file to do harm to."""

    def make(harm):
        path = shutil.copy(run_dir / "embeddings.h5", tmp_path / "e.h5")
        with h5py.File(path, "r+") as file:
            harm(file)
        return path

    return make


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: f["image/embedding"].__setitem__((3, 0), np.nan), "1 image embeddings are not finite unit vectors"),
        (lambda f: f["text/embedding"].__setitem__(0, 0.0), "1 text embeddings are not finite unit vectors"),
        (lambda f: f["text/embedding"].__setitem__(0, f["text/embedding"][0] * 3), "not finite unit vectors"),
        (lambda f: f["text/image_index"].__setitem__(0, 10**6), "the caption map points outside"),
        (lambda f: f.__delitem__("image/id"), "is damaged"),
        (lambda f: f.attrs.__setitem__("format_version", 7), "is no embeddings file of the format 1"),
    ],
)
def test_a_damaged_embeddings_file_is_named(broken, harm, message):
    with pytest.raises(EmbeddingsError, match=message):
        read_embeddings(broken(harm))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(EmbeddingsError, match="there are no embeddings at"):
        read_embeddings(tmp_path / "e.h5")
    (tmp_path / "e.h5").write_text("x")
    with pytest.raises(EmbeddingsError, match="is damaged"):
        read_embeddings(tmp_path / "e.h5")


def test_a_split_comes_with_its_own_caption_map(embeddings):
    pictures, captions, index = embeddings.split("dev")
    assert (len(pictures), len(captions)) == (12, 60)
    np.testing.assert_array_equal(pictures[index], embeddings.image_index[captions])
    with pytest.raises(EmbeddingsError, match="no pictures in the split 'val'; its splits: dev, test, train"):
        embeddings.split("val")


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


def test_trap_zero_or_non_finite_features_raise_in_baselines():
    for value in (0.0, np.nan):
        bad = np.full((3, 4), value)
        with pytest.raises(MetricsError, match="have no direction"):
            unlearned(bad, np.ones((3, 4)), np.arange(3), images_are_space=True)


def test_the_result_has_the_promised_keys_and_every_table_the_gallery_sizes(embeddings, store):
    result = evaluate(embeddings, store)
    assert (result["split"], result["n_images"], result["n_captions"], result["selected_on"]) == ("test", 12, 60, "dev")
    assert list(result["models"]) == ["multimodal", "image_only", "text_only", "chance"]
    side = result["models"]["multimodal"]["image_to_text"]
    assert {"R@1", "R@5", "R@10", "R@1_ci", "median_rank", "mean_rank", "mrr"} <= set(side)
    assert side["R@1_ci"][0] <= side["R@1"] <= side["R@1_ci"][1]
    assert result["models"]["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 12)
    json.dumps(result, allow_nan=False)
    assert "12 pictures, 60 captions" in markdown_table(result)
    assert terminal_table(result).count("\n") == 9
    rows = csv_table(result).splitlines()
    assert len(rows) == 9
    assert rows[0].startswith("split,n_images,n_captions,model,direction,R@1,")
    assert evaluate(embeddings, store) == result


def test_a_split_that_chose_or_taught_the_model_is_said_to_flatter(embeddings, store):
    assert any("flatter" in note for note in notes(evaluate(embeddings, store, "dev")))
    assert any("trained on these pictures" in note for note in notes(evaluate(embeddings, store, "train")))
    assert not any("flatter" in note for note in notes(evaluate(embeddings, store)))


def test_trap_a_store_of_other_features_is_refused(embeddings, store, monkeypatch):
    monkeypatch.setitem(store.fingerprints, "image", "fine-tuned")
    with pytest.raises(EvaluationError, match=r"is not the store that the run was fitted on \(image differ\)"):
        evaluate(embeddings, store)
    assert evaluation.MAPS == 20


def test_exact_search_agrees_with_the_matrix_product_and_k_may_exceed_the_gallery():
    generator = np.random.default_rng(0)
    gallery, queries = (
        generator.standard_normal((30, 8)).astype(np.float32),
        generator.standard_normal((4, 8)).astype(np.float32),
    )
    scores, rows = exact_search(gallery, queries, 7)
    np.testing.assert_array_equal(rows, np.argsort(-(queries @ gallery.T), axis=1)[:, :7])
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ gallery.T, rows, 1), rtol=1e-5)
    scores, rows = exact_search(gallery, queries, 500)
    assert rows.shape == (4, 30)
    assert rows.min() == 0  # no -1 that would be the last item


def test_search_returns_pictures_with_captions_and_captions_with_pictures(embeddings):
    searcher = Searcher(embeddings, lambda query: embeddings.texts[7])
    hits = searcher.search("anything", "text2image", 100)
    assert len(hits) == 60 == len({hit.id for hit in hits})
    scores = embeddings.images @ embeddings.texts[7]
    assert [hit.image_row for hit in hits] == np.argsort(-scores, kind="stable").tolist()
    assert hits[0].score == pytest.approx(scores.max(), rel=1e-5)
    assert hits[0].captions == [
        embeddings.captions[row] for row in np.flatnonzero(embeddings.image_index == hits[0].image_row)
    ]
    assert [hit.rank for hit in hits] == list(range(1, 61))


def test_search_by_picture_and_within_a_split(embeddings, drawn):
    searcher = Searcher(embeddings, lambda path: embeddings.images[50], split="dev")
    hits = searcher.search(str(drawn / "query.jpg"), "image2text", 3)
    assert all(embeddings.splits[hit.image_row] == "dev" for hit in hits)
    rows = np.flatnonzero(np.isin(embeddings.image_index, np.flatnonzero(np.array(embeddings.splits) == "dev")))
    assert hits[0].captions == [embeddings.captions[rows[np.argmax(embeddings.texts[rows] @ embeddings.images[50])]]]


def test_trap_a_query_that_is_not_finite_raises_instead_of_a_hit(embeddings):
    searcher = Searcher(embeddings, lambda query: np.full(embeddings.images.shape[1], np.nan, np.float32))
    with pytest.raises(SearchError, match="not finite"):
        searcher.search("a dog", "text2image")


@pytest.mark.parametrize(
    ("query", "mode", "message"),
    [
        ("  ", "text2image", "the query is empty"),
        ("a dog", "image2text", "'a dog' is no file; image2text takes a picture's path"),
        ("{drawn}", "image2text", "is a folder"),
        ("{drawn}/query.jpg", "text2image", "add --mode image2text"),
    ],
)
def test_queries_of_the_wrong_kind_are_named(query, mode, message, drawn):
    with pytest.raises(SearchError, match=message):
        check_query(query.format(drawn=drawn), mode)


def test_a_long_query_is_a_sentence_not_a_path_too_long():
    check_query("A dog runs . " * 60, "text2image")
    with pytest.raises(SearchError, match="is no file"):
        check_query("A dog runs . " * 60, "image2text")
