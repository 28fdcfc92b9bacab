"""Search: four modes, terms added and subtracted, the least score, moved folders, queries of a pipe, pages of hits."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onceover import workflows
from onceover.analysis.hits import draw_hits, plot_hits
from onceover.analysis.hits_page import HitsFile
from onceover.analysis.hits_shown import Hits
from onceover.base.outputs import OutputError
from onceover.configs.schema import ConfigError
from onceover.heads.checkpoint import load_run
from onceover.heads.originals import Originals
from onceover.heads.query import QueryEmbedder
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.index import folders_of, source_of
from onceover.retrieval.queries import MINUS_WEIGHT, further_terms, query_of, read_queries, term_of
from onceover.retrieval.search import Query, Searcher, SearchError, Term

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def embedder(run_dir) -> QueryEmbedder:
    return QueryEmbedder(load_run(run_dir), device="cpu")


@pytest.fixture(scope="module")
def embeddings(run_dir):
    return read_embeddings(run_dir / "embeddings.h5")


@pytest.fixture
def folders(drawn, tmp_path) -> tuple[Path, Path]:
    """Two folders of three images each, in which one name occurs twice."""
    names = sorted((drawn / "images").glob("*.jpg"))
    for number, folder in enumerate(("first", "second")):
        (tmp_path / folder / "below").mkdir(parents=True)
        for place, path in zip(("a.jpg", "b.jpg", "below/c.jpg"), names[3 * number :], strict=False):
            shutil.copy(path, tmp_path / folder / place)
    return tmp_path / "first", tmp_path / "second"


def unit(vector):
    return vector / np.sqrt(sum(float(value) ** 2 for value in vector))


def test_a_query_is_the_normalised_sum_of_its_terms(embedder, embeddings, drawn):
    picture = drawn / "query.jpg"
    gallery = embeddings.gallery("image")
    terms = (
        Term(text="a red circle", weight=0.5),
        Term(image=str(picture), weight=0.3),
        Term(image=picture.read_bytes(), weight=0.2),
        Term(item=gallery.ids[7], weight=0.4),
        Term(text="a blue star", weight=-0.6),
    )
    texts = embedder.embed_texts(["a red circle", "a blue star"])
    (image,) = embedder.embed_images([str(picture)])
    expected = unit(0.5 * texts[0] + (0.3 + 0.2) * image + 0.4 * embeddings.images[7] - 0.6 * texts[1])
    hits = Searcher(gallery, embedder).search(Query(terms), 60)
    for hit in hits:
        assert hit.score == pytest.approx(float(embeddings.images[gallery.ids.index(hit.id)] @ expected), abs=1e-6)
    own = {gallery.ids[7], *(name for name, path in zip(gallery.ids, gallery.paths, strict=True) if same(drawn, path))}
    assert {hit.id for hit in hits} == set(gallery.ids) - own


def same(drawn: Path, path: str) -> bool:
    return (drawn / path).read_bytes() == (drawn / "query.jpg").read_bytes()


@pytest.mark.parametrize("index_type", [None, "flat", "hnsw", "ivf", "ivfpq"])
@pytest.mark.parametrize("is_biased", [False, True])
def test_items_have_rows_and_vectors_without_their_bias(embeddings, tmp_path, index_type, is_biased, monkeypatch):
    from onceover.retrieval import index
    from onceover.retrieval.index import segments

    monkeypatch.setattr(segments, "MIN_TRAINING_ROWS", 1)
    gallery = embeddings.gallery("image", rerank="qbnorm" if is_biased else "none")
    searched = gallery
    if index_type is not None:
        probes = embeddings.probes("image", is_biased)
        made = {"memory": 2**40, "run": "r", "source": "s", "min_recall": 0.0, "kind": index_type}
        index.update(tmp_path / "i", gallery, probes, **made)
        index.remove(tmp_path / "i", [gallery.ids[4]], probes=probes)
        searched = index.Index(tmp_path / "i")
        assert searched.row_of(gallery.ids[4]) is None
    row = searched.row_of(gallery.ids[9])
    assert searched.item(row)["id"] == gallery.ids[9]
    np.testing.assert_allclose(searched.vector(row), embeddings.images[9], atol=1e-6)
    assert searched.row_of("no such image") is None


def test_an_image_finds_others_and_neither_itself_nor_a_copy(run_dir, drawn, store, embeddings):
    path = drawn / store.image_paths[5]
    hits = workflows.search(run_dir, str(path), mode="image2image", top_k=60, **CPU)
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = [name for name, sha256 in zip(store.image_ids, store.sha256, strict=True) if sha256 != content]
    assert {name for hit in hits for name in [hit.id, *hit.same]} == set(expected)
    scores = embeddings.images @ embeddings.images[5]
    best = max(float(scores[store.image_ids.index(name)]) for name in expected)
    assert hits[0].score == pytest.approx(best, abs=1e-4)


def test_a_text_finds_captions_and_not_the_equal_one(run_dir, store):
    text = store.captions[3]
    hits = workflows.search(run_dir, text, mode="text2text", top_k=300, **CPU)
    assert {hit.captions[0] for hit in hits} == set(store.captions) - {text}


def test_trap_images_in_an_index_of_images_are_searched_by_the_mode_that_the_error_names(fails, run, run_dir, folders):
    index = folders[0].parent / "i"
    run("index", "--run", run_dir, "--images", folders[0], "--index", index, "--device", "cpu")
    query = ("search", "--index", index, "--query", folders[0] / "a.jpg", "--device", "cpu")
    assert fails(*query, "--mode", "image2text") == (
        f"{index} holds no captions, only images; search these with --mode text2image or image2image, or index "
        f"captions: onceover index --run RUN --index {index} --captions …"
    )
    found = json.loads(run(*query, "--mode", "image2image", "--json").stdout)
    assert found["mode"] == "image2image"
    assert {hit["id"] for hit in found["hits"]} == {"b.jpg", "below/c.jpg"}
    assert "image2image takes an image's path (for a text: --mode text2image)" in fails(
        "search", "--index", index, "--query", "a red circle", "--mode", "image2image"
    )
    assert "is a file; to search by an image, add --mode image2text (finds captions) or image2image" in fails(*query)


def test_no_hit_is_an_answer_and_the_best_score_is_told(run, run_dir):
    query = ("search", "--run", run_dir, "--query", "a red circle", "--device", "cpu", "--json")
    scores = [hit["score"] for hit in json.loads(run(*query).stdout)["hits"]]
    some = json.loads(run(*query, "--min-score", scores[2]).stdout)["hits"]
    assert [hit["score"] for hit in some] == scores[:3]
    none = run(*query, "--min-score", 1.5)
    assert json.loads(none.stdout)["hits"] == []
    assert f"no hit scores 1.5 or more; the best scores {scores[0]:.3f}" in none.stderr
    assert "the least score is nan; give a number" in run(*query, "--min-score", "nan", code=1).stderr


def test_weights_are_shared_among_the_terms(drawn):
    picture = str(drawn / "query.jpg")
    further = further_terms(["in the snow", picture], ["a dog", "a cat"], 0.4)
    assert query_of("a house", "text2image", 0.4, further) == Query(
        (
            Term(text="a house", weight=0.4),
            Term(text="in the snow", weight=0.3),
            Term(image=picture, weight=0.3),
            Term(text="a dog", weight=-MINUS_WEIGHT / 2),
            Term(text="a cat", weight=-MINUS_WEIGHT / 2),
        )
    )
    assert query_of(picture, "image2text", 1.0, ()) == Query((Term(image=picture),))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("s3://bucket/a", Term(image="s3://bucket/a", weight=2)),
        ("dogs, cats.", Term(text="dogs, cats.", weight=2)),
        ("either/or", Term(text="either/or", weight=2)),
        ("x.jpg", "there is no file 'x.jpg'; give an image's path, or a text"),
        ("{drawn}/images", "is a folder; give an image's path, or a text"),
        (" ", "the query is empty"),
        ("a \udcff dog", "holds bytes that are no UTF-8"),
    ],
)
def test_terms_are_told_apart_as_texts_and_images(drawn, value, expected):
    value = value.format(drawn=drawn)
    if isinstance(expected, Term):
        assert term_of(value, 2) == expected
        return
    with pytest.raises(SearchError, match=re.escape(expected)):
        term_of(value, 2)


def test_subtracting_and_several_terms_at_the_command_line(run, run_dir, drawn, embedder, embeddings):
    picture = str(drawn / "query.jpg")
    terms = ("--with", "a blue star", "--with", picture, "--weight", 0.6, "--minus", "a green ring")
    query = ("search", "--run", run_dir, "--query", "a red circle", *terms, "--top-k", 3, "--json", "--device", "cpu")
    hits = json.loads(run(*query).stdout)["hits"]
    texts = embedder.embed_texts(["a red circle", "a blue star", "a green ring"])
    (image,) = embedder.embed_images([picture])
    vector = unit(0.6 * texts[0] + 0.2 * texts[1] + 0.2 * image - 0.5 * texts[2])
    for hit in hits:
        expected = float(embeddings.images[embeddings.ids.index(hit["id"])] @ vector)
        assert hit["score"] == pytest.approx(expected, abs=1e-5)
    unmixed = workflows.search(run_dir, "a red circle", with_="a red circle", minus=picture, top_k=1, **CPU)
    assert unmixed[0].score == pytest.approx(float((embeddings.images @ unit(texts[0] - 0.5 * image)).max()), abs=1e-5)


def test_a_moved_folder_is_noticed_and_found_again_at_its_new_place(run, fails, run_dir, folders):
    index, moved = folders[0].parent / "i", folders[0].parent / "moved"
    run("index", "--run", run_dir, "--images", folders[0], "--index", index, "--device", "cpu")
    query = ("search", "--index", index, "--query", "a red circle", "--json", "--device", "cpu")
    there = run(*query)
    assert "--root" not in there.stderr
    folders[0].rename(moved)
    gone = run(*query)
    first = json.loads(gone.stdout)["hits"][0]["path"]
    assert (
        f"3 of 3 hits have no file: {first} is not there; if {folders[0]} has moved, name its new place: "
        "--root NEW_FOLDER"
    ) in gone.stderr
    assert gone.stdout == there.stdout
    found = run(*query, "--root", moved)
    assert "--root" not in found.stderr
    before = [Path(hit["path"]) for hit in json.loads(there.stdout)["hits"]]
    after = [hit["path"] for hit in json.loads(found.stdout)["hits"]]
    assert after == [str(moved / path.relative_to(folders[0])) for path in before]
    (moved / "a.jpg").unlink()
    assert "1 of 3 hits have no file" in run(*query, "--root", moved).stderr
    assert f"{index}/x is no folder" in fails(*query, "--root", index / "x", code=2)


def test_several_folders_share_an_index_and_are_kept_up_to_date(run, fails, run_dir, folders):
    first, second = folders
    index = first.parent / "i"
    made = ("index", "--run", run_dir, "--index", index, "--device", "cpu")
    run(*made, "--images", first)
    grown = run(*made, "--images", first, "--images", second).stderr
    assert "encoding 3 images" in grown
    assert "6 images: 6 added" in grown
    assert "6 images: up to date" in run(*made, "--images", second, "--images", first).stderr
    query = ("search", "--index", index, "--query", "a red circle", "--top-k", 9, "--json", "--device", "cpu")
    hits = json.loads(run(*query).stdout)["hits"]
    files = sorted(str(path) for folder in folders for path in folder.rglob("*.jpg"))
    assert sorted(hit["id"] for hit in hits) == sorted(hit["path"] for hit in hits) == files
    assert f"of {first} + {second}" in run("info", index).stdout
    shutil.copy(second / "a.jpg", first / "new.jpg")
    (second / "b.jpg").unlink()
    changed = run(*made, "--images", first, "--images", second).stderr
    assert "6 images: 1 added, 1 removed" in changed
    excluded = run(*made, "--images", first, "--images", second, "--exclude", "below/*.jpg", "--exclude", "new.jpg")
    # vectors may differ in the last digit
    assert re.search(r"^3 images: \d added, [3-6] removed$", excluded.stderr, re.MULTILINE)
    shutil.rmtree(second / "below")
    message = fails(*made, "--images", first)
    assert message.startswith(f"{index}/images indexes {first} + {second}, not {first}; name another --index")
    moved = first.parent / "moved"
    first.rename(moved)
    paths = [hit["path"] for hit in json.loads(run(*query, "--root", moved).stdout)["hits"]]
    assert {Path(path).parent for path in paths} <= {moved, second}


NESTED = "{tmp}/first/below lies in {tmp}/first, which is named, too; name the outer one alone"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("first", "first"), "{tmp}/first is named twice; name each folder once"),
        (("first", "first/below"), NESTED),
        (("first/below", "first"), NESTED),
        (("first", "none"), "{tmp}/none is no folder; name one that holds images"),
    ],
)  # fmt: skip
def test_folders_that_overlap_are_refused_before_anything_is_encoded(fails, run_dir, folders, names, message):
    parent = folders[0].parent
    images = [part for name in names for part in ("--images", parent / name)]
    refused = fails("index", "--run", run_dir, *images, "--index", parent / "i", "--device", "cpu")
    assert refused == message.format(tmp=parent)
    assert not (parent / "i/images.h5").exists()


def test_the_folders_of_an_index_are_told_apart_and_those_of_earlier_versions_are_guessed(tmp_path):
    (tmp_path / "a + b").mkdir()
    assert folders_of({"source": "/a + b", "folders": ["/a + b"]}) == ["/a + b"]
    assert folders_of({"source": f"{tmp_path}/a + b"}) == [f"{tmp_path}/a + b"]
    assert folders_of({"source": source_of(["/b", "/a"])}) == ["/a", "/b"]


def test_a_folder_with_a_plus_in_its_name_is_one_folder_when_it_has_moved(run, run_dir, drawn, tmp_path):
    images = tmp_path / "cats + dogs"
    images.mkdir()
    for number in range(3):
        shutil.copy(drawn / f"images/{number:04d}.jpg", images)
    run("index", "--run", run_dir, "--index", tmp_path / "i", "--images", images, "--device", "cpu")
    images.rename(tmp_path / "moved")
    query = ("search", "--index", tmp_path / "i", "--query", "a red circle", "--device", "cpu")
    shown = run(*query, "--json", "--root", tmp_path / "moved")
    assert {Path(hit["path"]).parent for hit in json.loads(shown.stdout)["hits"]} == {tmp_path / "moved"}
    assert f"if {images} has moved" in run(*query).stderr


def test_adding_a_folder_does_not_hide_that_images_of_the_first_have_vanished(run, fails, run_dir, folders):
    first, second = folders
    index = first.parent / "i"
    made = ("index", "--run", run_dir, "--index", index, "--device", "cpu")
    run(*made, "--images", first)
    for path in sorted(first.rglob("*.jpg"))[1:]:
        path.unlink()
    before = (index / "images/CURRENT").read_bytes()
    message = fails(*made, "--images", first, "--images", second)
    assert message.startswith(f"2 of 3 indexed images are no longer in {first} + {second}")
    assert (index / "images/CURRENT").read_bytes() == before


def test_an_address_beside_a_folder_is_refused_before_it_is_asked_for(fails, run_dir, folders):
    first, _ = folders
    made = ("index", "--run", run_dir, "--index", first.parent / "i", "--device", "cpu")
    message = fails(*made, "--images", first, "--images", "s3://bucket/images")
    assert message.startswith("s3://bucket/images is an address, which is indexed by itself")


def test_lines_of_a_pipe_are_answered_one_by_one(run_dir):
    """Nothing of a query is lost where the terminal is not UTF-8."""
    command = [sys.executable, "-m", "onceover", "search", "--run", run_dir, "--queries", "-", "--format", "jsonl"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf-8"}
    pipes["env"] = os.environ | {"PYTHONIOENCODING": "cp1252"}
    with subprocess.Popen([*map(str, command), "--device", "cpu", "--top-k", "2"], **pipes) as process:
        for query in ("a red circle", "Ein Hund springt \u2192 \u72d7 \U0001f415"):
            process.stdin.write(f"{query}\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())  # before the next line is written
            assert answer["query"] == query
            assert len(answer["hits"]) == 2
        rest, _ = process.communicate("a green ring")
        assert json.loads(rest)["query"] == "a green ring"
    assert process.returncode == 0


class Pipe(io.BytesIO):
    """Gives so few bytes at a time."""

    def read1(self, _size: int = -1) -> bytes:
        return super().read1(5)


def test_queries_are_read_in_pieces_without_losing_or_joining_any():
    text = "\ufeffein Hündchen\r\n\n  zwei  \rdrei\n\nvier"
    batches = list(read_queries(Pipe(text.encode()), "q"))
    assert [query for batch in batches for query in batch] == ["ein Hündchen", "zwei", "drei", "vier"]
    assert list(read_queries(io.BytesIO(text.encode()), "q")) == [["ein Hündchen", "zwei", "drei"], ["vier"]]
    assert [len(batch) for batch in read_queries(io.BytesIO(b"x\n" * 600), "q")] == [256, 256, 88]
    with pytest.raises(SearchError, match=r"q, line 2 has more than 10,000 characters"):
        list(read_queries(io.BytesIO(b"a\n" + b"x" * 10_001), "q"))


def shown_images(page: str) -> list[str]:
    return re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)


def test_a_page_of_hits_shows_queries_images_scores_and_paths(run, run_dir, drawn, tmp_path):
    page, queries = tmp_path / "hits.html", tmp_path / "q.txt"
    queries.write_text("a red circle\n<b>a blue star</b>\n", encoding="utf-8")
    with_ = ("--with", drawn / "query.jpg", "--minus", "a dog")
    made = run("search", "--run", run_dir, "--queries", queries, *with_, "--out", page, "--json", "--device", "cpu")
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;a blue star&lt;/b&gt;" in text
    assert "<title>Hits of 2 queries</title>" in text
    assert re.search(r"@media print \{\s*:root \{[^}]*--text: #000", text)  # in a dark browser, too
    assert len(shown_images(text)) == 2 * (1 + 5)
    assert "http" not in text.replace("http-equiv", "")
    for result in json.loads(made.stdout):
        for hit in result["hits"]:
            assert f"<b>{hit['score']:.3f}</b>" in text
            assert hit["path"] in text
    assert f"wrote {page}" in made.stderr
    refused = run("search", "--run", run_dir, "--queries", queries, "--out", tmp_path / "h.png", code=2).stderr
    assert "for --queries name a page: --out hits.html" in refused


def test_a_page_is_never_written_over_a_strangers(run_dir, tmp_path):
    page = tmp_path / "hits.html"
    page.write_text("my page")
    with pytest.raises(OutputError):
        workflows.search(run_dir, "a red circle", figure=page, **CPU)
    assert page.read_text() == "my page"


def test_a_page_holds_so_many_queries_and_says_what_it_leaves_out(tmp_path, monkeypatch, told):
    from onceover.analysis import hits_page

    monkeypatch.setattr(hits_page, "MAX_QUERIES", 3)
    file = HitsFile(tmp_path / "h.html", "text")
    for _ in range(2):
        file.add([Query((Term(text="x"),))] * 2, [Hits([], "text", lambda hit, size: None)] * 2)
    file.finish()
    one = HitsFile(tmp_path / "one.html", "text")
    one.add([Query((Term(text="a dog"), Term(text="snow", weight=-0.5)))], [Hits([], "text", lambda hit, size: None)])
    one.finish()
    assert "<title>Hits of “a dog” − “snow”</title>" in (tmp_path / "one.html").read_text(encoding="utf-8")
    assert f"{tmp_path}/h.html shows the first 3 queries; 1 are left out" in told
    assert (tmp_path / "h.html").read_text().count("No hit.") == 3


def test_hits_are_shown_from_their_files_and_else_from_thumbnails(run_dir, drawn, tmp_path):
    hits = workflows.search(run_dir, "a red circle", top_k=2, **CPU)
    assert isinstance(hits, list)
    (image, _) = hits.images(640)
    with Image.open(drawn / hits[0].path) as original:
        assert image.size == original.size  # larger than a thumbnail
        assert np.abs(np.asarray(image, float) - np.asarray(original.convert("RGB"), float)).mean() < 4
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    Image.new("RGB", (300, 300), "red").save(data / hits[0].path)  # another image by the same name
    (data / hits[1].path).write_bytes(b"no image")
    moved = workflows.search(run_dir, "a red circle", top_k=3, root=data, **CPU)
    assert [hit.path for hit in moved] == [hits[0].path, hits[1].path, str(data / moved[2].path)]
    assert [picture.size for picture in hits.images(100)] == [(100, 100)] * 2


def test_an_image_that_was_changed_since_is_not_shown_as_the_one_that_was_encoded(run_dir, folders, told):
    index = folders[0].parent / "i"
    workflows.index(run_dir, index, images=folders[0], options=workflows.IndexOptions(device="cpu"))
    for path in folders[0].rglob("*.jpg"):
        Image.new("RGB", (300, 300), "red").save(path)
    hits = workflows.search(None, "a red circle", index=index, **CPU)
    # drawings of 224 pixels, decoded at half their size, which is enough for the encoder
    assert [image.size for image in hits.images(640)] == [(112, 112)] * 3
    assert f"{hits[0].path} is not the image that was encoded; what was kept of that one is shown" in told
    captions = workflows.search(run_dir, "a red circle", mode="text2text", top_k=1, **CPU)
    assert captions.images(100)[0].size == (100, 100)


def test_an_image_is_found_in_its_own_folder_where_another_one_with_the_same_names_has_moved(run, run_dir, folders):
    index = folders[0].parent / "i"
    images = ("--images", folders[0], "--images", folders[1])
    run("index", "--run", run_dir, "--index", index, *images, "--device", "cpu")
    query = ("search", "--index", index, "--query", "a red circle", "--top-k", 9, "--json", "--device", "cpu")
    before = {hit["id"]: Path(hit["path"]).read_bytes() for hit in json.loads(run(*query).stdout)["hits"]}
    moved = folders[0].parent / "moved"
    folders[0].rename(moved)
    shown = run(*query, "--root", moved)
    assert "--root" not in shown.stderr
    assert {hit["id"]: Path(hit["path"]).read_bytes() for hit in json.loads(shown.stdout)["hits"]} == before


def test_a_dataset_that_has_moved_is_noticed(run_dir, drawn, tmp_path, monkeypatch, told):
    monkeypatch.setattr(Originals, "_dataset", tmp_path / "gone")
    workflows.search(run_dir, "a red circle", top_k=2, root=drawn, **CPU)
    assert not any("--root" in line for line in told)
    hits = workflows.search(run_dir, "a red circle", top_k=2, **CPU)
    message = f"2 of 2 hits have no file: {hits[0].path} is not there; if {tmp_path}/gone has moved, name its new place"
    assert f"{message}: --root NEW_FOLDER" in told


def test_huge_and_tiny_weights_give_the_same_hits_as_others(embedder, embeddings):
    searcher = Searcher(embeddings.gallery("image"), embedder)
    found = []
    for scale in (1, 1e308, 1e-320):
        terms = (Term(text="a red circle", weight=scale), Term(text="a blue star", weight=scale))
        found.append([hit.id for hit in searcher.search(Query(terms), 9)])
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_an_unknown_mode_and_a_query_that_is_too_long_are_refused_before_a_model_is_loaded(run_dir, monkeypatch):
    monkeypatch.setattr("onceover.heads.searching.open_collection", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ConfigError, match=r"no mode 'text2video'; take one of text2image, image2text"):
        workflows.search(run_dir, "a dog", mode="text2video")
    with pytest.raises(SearchError, match=r"the query has 10,001 characters; shorten it to 10,000 at most"):
        workflows.search(run_dir, "x" * 10_001)
    for least in (float("nan"), float("inf")):
        with pytest.raises(SearchError, match=r"the least score is (nan|inf); give a number, such as 0\.3"):
            workflows.search(run_dir, "a dog", min_score=least)


def test_hits_show_themselves_in_a_notebook_and_stay_a_list(run_dir):
    hits = workflows.search(run_dir, "a red circle", top_k=2, **CPU)
    html = hits._repr_html_()
    assert len(shown_images(html)) == 2
    assert hits[0].path in html
    assert str(hits).splitlines()[0] == f"  1  {hits[0].score:6.3f}  {hits[0].path}"
    assert type(pickle.loads(pickle.dumps(hits))) is list
    assert pickle.loads(pickle.dumps(hits)) == list(hits)
    none = workflows.search(run_dir, "a red circle", min_score=2, **CPU)
    assert "No hit." in none._repr_html_()
    assert str(none) == "no hit"
    captions = workflows.search(run_dir, "a red circle", mode="text2text", top_k=1, **CPU)
    assert str(captions).endswith(captions[0].captions[0])


def test_the_figure_begins_with_the_querys_image_in_a_frame(run_dir, drawn, tmp_path):
    query = Query((Term(image=str(drawn / "query.jpg")), Term(text="a dog", weight=-0.5)))
    hits = workflows.search(run_dir, str(drawn / "query.jpg"), mode="image2image", minus="a dog", top_k=3, **CPU)
    figure = draw_hits(hits, query, "image", hits.images(300))
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles[0] == "query"
    assert titles[1:] == [f"{hit.rank}. {hit.score:.3f}" for hit in hits]
    assert figure.get_suptitle() == "query.jpg − “a dog”"
    assert len({axes.images[0].get_array().shape for axes in figure.axes if axes.images}) == 1
    plot_hits([], query, "image", tmp_path / "none.png")
    plot_hits([], query, "text", tmp_path / "none.svg")
    assert "no hit" in (tmp_path / "none.svg").read_text()
    two = replace(query, terms=(*query.terms, Term(image=(drawn / "query.jpg").read_bytes())))
    assert len([axes for axes in draw_hits(hits, two, "text").axes if axes.images]) == 2
    assert (tmp_path / "none.png").stat().st_size > 5000
