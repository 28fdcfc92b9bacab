"""Embeddings files, evaluation tables, comparisons, the page of errors, and search."""

import dataclasses
import errno
import json
import math
import os
import shutil
import tempfile
import types
from html import escape

import h5py
import numpy as np
import pytest
from test_store import write

from onceover.analysis.report import error_page
from onceover.base.hdf5 import sign_hdf5
from onceover.base.temporary import TemporaryFileError
from onceover.configs.schema import ExtractConfig
from onceover.extract import store as module
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore
from onceover.heads.training import fit
from onceover.retrieval import gallery as galleries
from onceover.retrieval import store_pairs
from onceover.retrieval.comparison import compare_runs
from onceover.retrieval.embeddings import EmbeddingsError, read_embeddings
from onceover.retrieval.evaluation import EvaluationError, evaluate
from onceover.retrieval.exact import QueryError
from onceover.retrieval.gallery import CaptionLists
from onceover.retrieval.metrics import report
from onceover.retrieval.queries import check_query
from onceover.retrieval.ranks import rank
from onceover.retrieval.search import Query, Searcher, SearchError, Term
from onceover.retrieval.tables import (
    comparison_notes,
    comparison_tables,
    comparison_warnings,
    csv_table,
    evaluation_tables,
    markdown_table,
    notes,
    table_rows,
    warnings,
)


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
        sign_hdf5(path)
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
        (lambda f: f.attrs.__setitem__("format_version", 7), "is no embeddings file of the format 3"),
    ],
)
def test_a_damaged_embeddings_file_is_named(broken, harm, message):
    with pytest.raises(EmbeddingsError, match=message):
        read_embeddings(broken(harm))


def test_the_captions_of_an_image_are_those_that_name_it_in_their_order():
    captions = CaptionLists(["a", "b", "c", "d"], np.array([2, 0, -1, 2]), 3)
    assert (len(captions), list(captions)) == (3, [["b"], [], ["a", "d"]])
    assert (captions[-1], captions[1:]) == (["a", "d"], [[], ["a", "d"]])
    with pytest.raises(IndexError):
        captions[3]
    assert list(CaptionLists([], np.zeros(0, int), 2)) == [[], []]


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
    with pytest.raises(EmbeddingsError, match="no images in the split 'val'; its splits: dev, test, train"):
        embeddings.split("val")


BASELINES = ["cca", "ridge", "text_knn", "image_knn", "image_only", "text_only", "chance"]


def test_the_result_has_the_promised_keys_and_every_number_its_gallery_size(embeddings, store):
    result = evaluate(embeddings, store)
    assert (result["split"], result["n_images"], result["n_captions"], result["selected_on"]) == ("test", 12, 60, "dev")
    assert list(result["models"]) == ["multimodal", *BASELINES]
    side = result["models"]["multimodal"]["image_to_text"]
    assert {"R@1", "R@5", "R@10", "R@1_ci", "median_rank", "mean_rank", "mrr", "true_recall@5", "hub_skewness"} <= set(
        side
    )
    assert side["R@1_ci"][0] <= side["R@1"] <= side["R@1_ci"][1]
    assert (side["queries"], side["gallery"]) == (12, 60)
    assert result["models"]["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 12)
    low, high = result["models"]["multimodal"]["rsum_ci"]
    assert low <= result["models"]["multimodal"]["rsum"] <= high
    json.dumps(result, allow_nan=False)
    assert "12 images, 60 captions" in markdown_table(table_rows(result), notes(result))
    tables = evaluation_tables(result)
    assert [table.title for table in tables] == [
        "image → caption: 12 queries, gallery of 60",
        "caption → image: 60 queries, gallery of 12",
    ]
    assert [row[0] for row in tables[0].rows] == ["model", "multimodal", *BASELINES]
    rows = csv_table(result).splitlines()
    assert len(rows) == 17
    assert rows[0].startswith("split,n_images,n_captions,model,direction,R@1,")
    assert "true_recall@10" in rows[0]
    assert result["models"]["multimodal"]["dimensions"] == embeddings.images.shape[1]
    assert evaluate(embeddings, store) == result


def test_a_store_alone_gives_the_baselines(store):
    result = evaluate(None, store)
    assert list(result["models"]) == BASELINES
    dims = {name: row.get("dimensions") for name, row in result["models"].items()}
    assert dims["cca"] == result["models"]["cca"]["settings"]["dimensions"]
    assert (dims["text_knn"], dims["image_knn"]) == store.dims
    assert dims["ridge"] == store.dims[result["models"]["ridge"]["settings"]["onto"] == "text"]
    assert dims["image_only"] == dims["text_only"] == min(store.dims)
    assert dims["chance"] is None
    assert set(result["models"]["cca"]["settings"]) == {"strength", "dimensions", "power", "selection_rsum"}
    assert result["split"] == "test"
    assert evaluate(None, store, "dev")["n_images"] == 12
    with pytest.raises(EmbeddingsError, match="no images with captions in the split 'val'; use train, dev, test"):
        evaluate(None, store, "val")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_memory_bounds_what_the_baselines_are_fitted_on_whatever_is_measured(planted, monkeypatch, split):
    asked = []
    monkeypatch.setattr(store_pairs, "MIN_TRAIN", 100)
    monkeypatch.setattr(
        store_pairs, "most_images", lambda store, measured, memory: asked.append((measured, memory)) or 150
    )
    result = evaluate(None, planted, split, memory=7)
    size = {"train": 300, "dev": 100, "test": 200}[split]
    assert asked == [(size, 7)]
    assert result["baselines_fitted_on"] == {"images": 150, "of": 400 if split == "test" else 300}
    assert {result["models"][name]["fitted_images"] for name in BASELINES[:4]} == {150}
    assert (result["n_images"], result["n_captions"]) == (size, 2 * size)  # what is measured is whole
    assert any("0 images, as many as --memory allows" in note for note in notes(result))


def test_a_limit_below_what_the_baselines_need_is_told(planted, monkeypatch, told):
    monkeypatch.setattr(store_pairs, "MIN_TRAIN", 100)
    result = evaluate(None, planted, memory=2**20)
    assert result["baselines_fitted_on"] == {"images": 100, "of": 400}
    assert told == ["the memory limit is less than the fitted baselines need with 100 images, which they have"]


def test_a_larger_split_to_be_measured_leaves_less_room_to_fit(planted):
    few, many = (store_pairs.most_images(planted, measured, 2**31) for measured in (10**4, 10**5))
    assert few > many > 1000


def test_views_are_averaged_block_by_block_to_the_same_features(store, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    rows = np.flatnonzero(np.array(store.image_splits) == "train")
    pairs = store_pairs.read_pairs(store, rows)
    np.testing.assert_array_equal(pairs.images, store.image_features[rows].mean(1, dtype=np.float32))
    np.testing.assert_array_equal(rows[pairs.image_index], store.image_index[np.isin(store.image_index, rows)])


def test_corrections_for_hubs_get_rows_of_their_own_and_csls_says_that_it_is_transductive(embeddings, store):
    result = evaluate(embeddings, store, rerank=["qbnorm", "csls"])
    assert list(result["models"])[:3] == ["multimodal", "multimodal_qbnorm", "multimodal_csls_transductive"]
    said = " ".join(notes(result))
    assert "bank of training queries" in said
    assert "transductive: not to be compared" in said
    own = dataclasses.replace(embeddings, rerank="qbnorm")
    assert list(evaluate(own, store)["models"])[:2] == ["multimodal", "multimodal_qbnorm"]
    with pytest.raises(EvaluationError, match="unknown correction 'dsl'"):
        evaluate(embeddings, store, rerank=["dsl"])


@pytest.fixture
def planted(tmp_path):
    """A store of 600 images with two captions each whose features share six latent numbers."""
    generator = np.random.default_rng(0)
    latent, index = generator.standard_normal((600, 6)), np.repeat(np.arange(600), 2)
    images = latent @ generator.standard_normal((6, 20)) + 0.3 * generator.standard_normal((600, 20))
    texts = latent[index] @ generator.standard_normal((6, 16)) + 0.3 * generator.standard_normal((1200, 16))
    path = write(
        tmp_path, [f"{row}.jpg" for row in range(600)], ["train"] * 300 + ["dev"] * 100 + ["test"] * 200,
        [f"caption {row}" for row in range(1200)], index, images[:, None].astype(np.float32), texts.astype(np.float32),
    )  # fmt: skip
    with FeatureStore(path) as store:
        yield store


def test_trap_the_shuffled_control_falls_to_chance(planted, tmp_path, fit_config, changed):
    for name in ("right", "shuffled"):
        config = changed(fit_config, training={"shuffle_pairs": name == "shuffled", "learning_rate": 0.02})
        fit(planted, tmp_path / name, config)
    runs = {name: read_embeddings(tmp_path / name / "embeddings.h5") for name in ("right", "shuffled")}
    models = evaluate(runs["right"], planted, shuffled=runs["shuffled"])["models"]
    for direction in ("image_to_text", "text_to_image"):
        low, high = models["shuffled"][direction]["R@10_ci"]
        assert low - 2 < models["chance"][direction]["R@10"] < high + 2  # 5 %
        assert models["multimodal"][direction]["R@10"] > 50
        assert models["image_only"][direction]["R@10"] < 8


def test_a_dual_encoder_gets_a_zero_shot_row(drawn, tiny_clip, tmp_path):
    spec = f"hf:{tiny_clip}"
    extract(read_dataset(drawn), tmp_path / "s.h5", ExtractConfig(image_encoder=spec, text_encoder=spec), device="cpu")
    with FeatureStore(tmp_path / "s.h5") as store:
        result = evaluate(None, store)
        assert list(result["models"]) == ["zero_shot", *BASELINES]
        pictures = np.flatnonzero(np.array(store.image_splits) == "test")
        captions = np.flatnonzero(np.isin(store.image_index, pictures))
        images, texts = store.image_features[:][pictures].mean(1), store.text_features[:][captions]
        images, texts = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts))
        index = np.searchsorted(pictures, store.image_index[captions])
    found = report([rank(images, texts, index)], draws=0)
    assert result["models"]["zero_shot"]["rsum"] == pytest.approx(found["rsum"])


def test_a_dual_encoder_needs_nothing_to_train_on(drawn, tiny_clip, tmp_path):
    spec, dataset = f"hf:{tiny_clip}", read_dataset(drawn)
    alone = dataclasses.replace(dataset, splits=["test" if split == "test" else "" for split in dataset.splits])
    extract(alone, tmp_path / "s.h5", ExtractConfig(image_encoder=spec, text_encoder=spec), device="cpu")
    with FeatureStore(tmp_path / "s.h5") as store:
        result = evaluate(None, store)
    assert list(result["models"]) == ["zero_shot", "image_only", "text_only", "chance"]
    assert "nothing fitted" in notes(result)


def test_trap_baselines_are_chosen_without_a_look_at_the_reported_split(planted):
    before = {name: row.get("settings") for name, row in evaluate(None, planted)["models"].items()}
    features = np.array(planted.text_features)
    test = np.isin(planted.image_index, np.flatnonzero(np.array(planted.image_splits) == "test"))
    features[test] = np.random.default_rng(1).permutation(features[test])
    same = ("path", "local", "roles", "image_features", "image_splits", "image_index", "recipes", "dims", "captions")
    changed = types.SimpleNamespace(
        **{name: getattr(planted, name) for name in same}, text_features=features, fingerprints={"text": "other"}
    )
    after = evaluate(None, changed)["models"]
    assert {name: row.get("settings") for name, row in after.items()} == before
    assert after["cca"]["rsum"] < 60  # the permuted pairs were reported on


def test_runs_are_compared_query_by_query(embeddings):
    own = np.stack([embeddings.texts[embeddings.image_index == row].sum(0) for row in range(len(embeddings.ids))])
    good = dataclasses.replace(embeddings, images=own / np.linalg.norm(own, axis=1, keepdims=True))
    other = dataclasses.replace(good, images=np.roll(good.images, 1, axis=0))
    result = compare_runs({"a": good, "b": other, "c": good}, "train")
    assert result["differences"]["b"]["rsum"] == pytest.approx(
        result["runs"]["b"]["rsum"] - result["runs"]["a"]["rsum"]
    )
    first, second = comparison_tables(result)
    assert first.rows[0] == ["direction (gallery)", "metric", "a", "b", "difference [95 %]", "verdict"]
    verdicts = {(row[0].partition(" (")[0], row[1]): row[-1] for row in first.rows[1:]}
    assert verdicts["both", "rsum"] == verdicts["caption → image", "R@1"] == "worse"
    assert (second.title, second.rows[-1][-1]) == ("c against a", "not distinguishable")
    assert comparison_notes(result)[1] == "the 18 intervals are not corrected for multiple comparisons"
    assert "they say nothing about other seeds" in comparison_notes(result)[0]
    (warning,) = comparison_warnings(compare_runs({"a": good, "b": other}, "dev"))
    assert "flatter" in warning
    assert "transductive" in " ".join(comparison_notes(compare_runs({"a": good, "b": other}, "test", "csls")))
    assert "trained on these images" in " ".join(comparison_warnings(result))
    better = compare_runs({"b": other, "a": good}, "train")
    assert comparison_tables(better)[0].rows[1][-1] == "better"


def test_runs_of_other_pictures_or_a_single_run_are_not_compared(embeddings):
    with pytest.raises(EvaluationError, match="name at least two runs"):
        compare_runs({"a": embeddings})
    other = dataclasses.replace(embeddings, sha256=[f"{name}x" for name in embeddings.sha256])
    with pytest.raises(EvaluationError, match="test is not the same in a and b"):
        compare_runs({"a": embeddings, "b": other})


def test_the_page_of_errors_shows_the_worst_queries_with_the_rank_of_the_truth(embeddings):
    page = error_page(embeddings, "train", 3)
    pictures, captions, index = embeddings.split("train")
    to_text, to_image = rank(embeddings.images[pictures], embeddings.texts[captions], index)
    assert page.count("<article>") == 6
    assert page.count("data:image/jpeg;base64,") == 3 * (1 + 5) + 3
    worst = int(to_image.expected_rank().argmax())
    assert f"“{escape(embeddings.captions[captions[worst]])}”" in page
    assert f"rank {to_image.expected_rank().max():,.0f} of 36" in page
    assert f"rank {to_text.expected_rank().max():,.0f} of 180" in page
    bare = error_page(dataclasses.replace(embeddings, thumbnails=None, captions=["<b>"] * 300), "train", 1)
    assert "<img" not in bare
    assert "“&lt;b&gt;”" in bare


def test_a_split_that_chose_or_taught_the_model_is_said_to_flatter(embeddings, store):
    (warning,) = warnings(evaluate(embeddings, store, "dev"))
    assert "flatter" in warning
    (warning,) = warnings(evaluate(embeddings, store, "train"))
    assert "trained on these images" in warning
    assert warnings(evaluate(embeddings, store)) == []


def test_trap_a_store_of_other_features_is_refused(embeddings, store, monkeypatch):
    monkeypatch.setitem(store.fingerprints, "image", "fine-tuned")
    with pytest.raises(EvaluationError, match=r"is not the store that the run was fitted on \(image differ\)"):
        evaluate(embeddings, store)


class Embedder:
    """Hands out given vectors, whatever is asked."""

    def __init__(self, vectors, space):
        self.vectors, self.space, self.asked = np.atleast_2d(vectors), space, []

    def _given(self, kind, count):
        self.asked.append((kind, count))
        return self.vectors[np.arange(count) % len(self.vectors)]

    def embed_texts(self, texts):
        return self._given("texts", len(texts))

    def embed_images(self, images):
        return self._given("images", len(images))


def test_search_returns_pictures_with_captions_and_captions_with_pictures(embeddings):
    embedder = Embedder(embeddings.texts[7], embeddings.space)
    searcher = Searcher(embeddings.gallery("image"), embedder)
    hits = searcher.search("anything", 100)
    assert len(hits) == 60 == len({hit.id for hit in hits})
    scores = embeddings.images @ embeddings.texts[7]
    assert [embeddings.ids.index(hit.id) for hit in hits] == np.argsort(-scores, kind="stable").tolist()
    assert hits[0].score == pytest.approx(scores.max(), rel=1e-5)
    first = embeddings.ids.index(hits[0].id)
    assert hits[0].captions == [embeddings.captions[row] for row in np.flatnonzero(embeddings.image_index == first)]
    assert hits[0].path == embeddings.paths[first]
    assert [hit.rank for hit in hits] == list(range(1, 61))


def test_search_by_picture_and_within_a_split(embeddings):
    searcher = Searcher(embeddings.gallery("text", "dev"), Embedder(embeddings.images[50], embeddings.space))
    hits = searcher.search(Query((Term(image="any.jpg"),)), 3)
    assert all(embeddings.splits[embeddings.paths.index(hit.path)] == "dev" for hit in hits)
    rows = np.flatnonzero(np.isin(embeddings.image_index, np.flatnonzero(np.array(embeddings.splits) == "dev")))
    assert hits[0].captions == [embeddings.captions[rows[np.argmax(embeddings.texts[rows] @ embeddings.images[50])]]]


def test_trap_copies_are_shown_once_by_their_content_wherever_they_stand(embeddings):
    gallery = embeddings.gallery("image")
    contents = list(gallery.contents)
    scores = gallery.vectors @ embeddings.texts[0]
    best = np.argsort(-scores)[:9]
    for row in best[[1, 4, 8]]:
        contents[row] = contents[best[0]]
    searcher = Searcher(dataclasses.replace(gallery, contents=contents), Embedder(embeddings.texts[0], gallery.space))
    hits = searcher.search("x", 5)
    assert [gallery.ids.index(hit.id) for hit in hits] == best[[0, 2, 3, 5, 6]].tolist()
    assert hits[0].same == [gallery.ids[row] for row in best[[1, 4, 8]]]
    everything = dataclasses.replace(gallery, contents=["one"] * len(gallery))
    (only,) = Searcher(everything, Embedder(embeddings.texts[0], gallery.space)).search("x", 5)
    assert len(only.same) == 59
    assert "thumbnail" not in only.to_dict()


def test_all_copies_of_a_hit_are_listed_however_few_hits_are_asked_for(embeddings):
    gallery = embeddings.gallery("image")
    vectors, contents = gallery.vectors.copy(), list(gallery.contents)
    vectors[:30], contents[:30] = embeddings.texts[0], ["one"] * 30
    searcher = Searcher(
        dataclasses.replace(gallery, vectors=vectors, contents=contents), Embedder(embeddings.texts[0], gallery.space)
    )
    (hit,) = searcher.search("x", 1)
    assert {hit.id, *hit.same} == set(gallery.ids[:30])
    assert len(searcher.search("x", 2)) == 2


def test_many_queries_are_encoded_together_and_answered_in_order(embeddings):
    embedder = Embedder(embeddings.texts[[0, 60]], embeddings.space)
    searcher = Searcher(embeddings.gallery("text"), embedder)
    queries = ["a", Query((Term(image="p"),)), "b", Query((Term(text="a", weight=0.3), Term(image="p", weight=0.7)))]
    found = [[hit.id for hit in hits] for hits in searcher.search_many(queries, 2)]
    assert embedder.asked == [("texts", 2), ("images", 1)]  # each text and image once
    assert found[0] == found[1] == found[3] != found[2]
    assert searcher.search_many([]) == []


@pytest.mark.parametrize(
    ("query", "top_k", "message"),
    [
        ("a dog", 0, "top-k is 0; ask for at least 1"),
        (Query(()), 5, "the query is empty"),
        (Query((Term(),)), 5, "the query is empty"),
        (Query((Term(text=""),)), 5, "the query is empty"),
        (Query((Term(text="a", image="b"),)), 5, "is a text, an image or an item; this one has text and image"),
        (Query((Term(text="a", weight=math.nan),)), 5, "the weight of a term is nan"),
        (Query((Term(text="a", weight=0.0),)), 5, "all terms of the query have the weight 0"),
        (Query((Term(text="a"), Term(text="a", weight=-1.0))), 5, "the terms of the query cancel each other"),
        (Query((Term(item="no such"),)), 5, "the gallery holds no item 'no such'"),
    ],
)
def test_calls_that_cannot_be_meant_are_named(embeddings, query, top_k, message):
    searcher = Searcher(embeddings.gallery("image"), Embedder(embeddings.texts[0], embeddings.space))
    with pytest.raises(SearchError, match=message):
        searcher.search(query, top_k)


def test_trap_a_gallery_of_other_heads_is_refused(embeddings):
    with pytest.raises(SearchError, match="made by other heads or encoders"):
        Searcher(embeddings.gallery("image"), Embedder(embeddings.texts[0], "another"))


def test_trap_a_query_that_is_not_finite_raises_instead_of_a_hit(embeddings):
    bad = np.full(embeddings.images.shape[1], np.nan, np.float32)
    with pytest.raises(QueryError, match="not finite"):
        Searcher(embeddings.gallery("image"), Embedder(bad, embeddings.space)).search("a dog")


@pytest.mark.parametrize(
    ("query", "mode", "message"),
    [
        ("  ", "text2image", "the query is empty"),
        ("a dog", "image2text", "'a dog' is no file; image2text takes an image's path"),
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


def with_bias(rows=5000, dim=7):
    generator = np.random.default_rng(0)
    return generator.standard_normal((rows, dim)).astype(np.float32), generator.standard_normal(rows).astype(np.float32)


@pytest.mark.parametrize("way", ["memory", "file", "zeros"])
def test_vectors_get_their_bias_in_memory_or_in_a_file_whose_room_is_reserved(monkeypatch, way):
    vectors, bias = with_bias()
    if way != "memory":
        monkeypatch.setattr(galleries, "IN_MEMORY", 1000)

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if way == "zeros":
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    joined = galleries.with_bias(vectors, bias)
    assert isinstance(joined, np.memmap) == (way != "memory")
    np.testing.assert_array_equal(joined, np.column_stack([vectors, bias]))


def test_trap_a_full_temporary_folder_is_one_line_and_no_crash(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(galleries, "IN_MEMORY", 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TemporaryFileError) as error:
        galleries.with_bias(*with_bias(rows=100_000))
    assert str(error.value) == (
        f"a temporary file cannot be written in {tempfile.gettempdir()} (No space left on device); make room there, or "
        "name another folder in the environment variable TMPDIR"
    )


def test_a_query_of_bytes_that_are_no_text_is_refused(embeddings):
    searcher = Searcher(embeddings.gallery("image"), Embedder(embeddings.texts[7], embeddings.space))
    with pytest.raises(SearchError, match="holds bytes that are no UTF-8"):
        searcher.search("a \udcff dog")
