"""The report of a run: its numbers, what stands where a file is missing, and what it writes over."""

import dataclasses
import io
import json
import re
import shutil
from html import unescape

import numpy as np
import pytest
from PIL import Image
from test_plots import TABLE

from onceover import workflows
from onceover.analysis.figures.similarity_ordered import cluster_order, telling_words
from onceover.analysis.map_points import map_points
from onceover.analysis.report import document, open_files
from onceover.analysis.report.cells import table
from onceover.analysis.report.document import report_page
from onceover.analysis.report.figures import sweep
from onceover.analysis.report.hubs import hubs
from onceover.analysis.report.map_section import map_section
from onceover.analysis.report.near_duplicates import near_duplicates
from onceover.analysis.report.results import rank_bands
from onceover.analysis.sources import PlotError
from onceover.base.files import read_record
from onceover.retrieval.comparison import compare_runs
from onceover.retrieval.tables import comparison_rows, table_rows

HOSTILE = [
    "<script>alert(1)</script>",
    "\"quoted\" & 'so' </script><img src=x onerror=alert(1)>",
    "שלום עולם",
    "🐕 𝒳 {{ 7 * 7 }}",
]


@pytest.fixture(scope="module")
def evaluated(run_dir, store_file, tmp_path_factory):
    """A copy of the run with its evaluation."""
    folder = shutil.copytree(run_dir, tmp_path_factory.mktemp("reported") / "run")
    workflows.evaluate(folder, store=store_file)
    return folder


@pytest.fixture(scope="module")
def second(evaluated, tmp_path_factory):
    """A run to compare with, the same one again."""
    return shutil.copytree(evaluated, tmp_path_factory.mktemp("second") / "run")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    (folder / "results.csv").write_text(TABLE)
    return folder


@pytest.fixture(scope="module")
def whole(evaluated, second, swept, tmp_path_factory):
    """A report with all its parts."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    return workflows.report(evaluated, out, compare=[second], sweep=swept)


@pytest.fixture
def files(evaluated):
    with open_files(evaluated) as opened:
        yield opened


def tables_of(page):
    """The tables of a page by title: rows of text, the header first."""
    tables = {}
    for title, head, body in re.findall(
        r"<caption>(.*?)</caption>\s*<thead>(.*?)</thead>\s*<tbody>(.*?)</tbody>", page, re.DOTALL
    ):
        rows = [re.findall(r"<th[^>]*>(.*?)</th>", head)]
        rows += [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
        tables[unescape(title)] = [[unescape(cell) for cell in row] for row in rows]
    return tables


def notes_of(page):
    return [unescape(text) for text in re.findall(r'<p class="note">(.*?)</p>', page, re.DOTALL)]


def map_data(page):
    return json.loads(re.search(r'id="map-data">(.*?)</script>', page, re.DOTALL)[1])


def test_its_numbers_are_those_of_the_evaluation_and_of_the_comparison(whole, evaluated, second, files):
    page = whole.read_text(encoding="utf-8")
    tables = tables_of(page)
    result = read_record(evaluated / "evaluation-test.json", "the evaluation")
    assert tables["Evaluation on test"][1:] == table_rows(result)[1:]
    assert tables["Evaluation on test"][0][5] == "median rank"
    embeddings = files.run.embeddings
    compared = compare_runs({str(evaluated): embeddings, str(second): embeddings})
    assert tables["Comparison"][1:] == comparison_rows(compared)[1:]
    best = result["models"]["multimodal"]["image_to_text"]["R@1"]
    assert f"<dt>R@1</dt><dd>{best:.1f}</dd>" in page


def test_it_is_one_file_that_needs_nothing_else_and_holds_every_part(whole):
    page = whole.read_text(encoding="utf-8")
    titles = re.findall(r'<h2 id="\w+-title">(.*?)</h2>', page)
    assert titles == [
        "What was run", "Results", "Comparison", "Map", "Best and worst queries", "Hubs", "Ranks", "Similarity",
        "Training", "Sweep", "Health of the feature store",
    ]  # fmt: skip
    assert notes_of(page) == ["The map is drawn by a script, and scripts are switched off here."]
    assert page.count("data:image/svg+xml;base64,") == 7  # models, ranks, similarity, training; three of the sweep
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page
    assert whole.stat().st_size < 2_000_000


def test_the_map_holds_a_fifth_of_other_splits_with_the_ranks_of_the_reported_one(files):
    rows = map_section(files)["data"]["rows"]
    embeddings = files.run.embeddings
    splits = dict(zip(embeddings.ids, embeddings.splits, strict=True))
    assert all(row["split"] == splits[row["id"]] for row in rows)
    ranks = np.rint(files.searched.to_text.expected_rank()).tolist()
    assert [row["ranks"][0] for row in rows if row["split"] == "test"] == ranks
    assert {tuple(row["ranks"]) for row in rows if row["split"] != "test"} == {(None, None)}
    few = map_points(files.run, 10)
    assert [embeddings.splits[row] for row in few.pairs.images].count("test") == 8
    assert len(set(few.pairs.images.tolist())) == 10
    assert (embeddings.image_index[few.pairs.captions] == few.pairs.images).all()
    assert few.coordinates["tsne"].shape == few.coordinates["pca"].shape == (20, 2)


def test_what_is_missing_is_a_note_that_names_the_command(run_dir, tmp_path, told):
    folder = shutil.copytree(run_dir, tmp_path / "a run")
    provenance = json.loads((folder / "run.json").read_text())
    with open_files(folder) as opened:
        bare = dataclasses.replace(opened.run.embeddings, thumbnails=None)
        changed = dataclasses.replace(
            opened,
            run=dataclasses.replace(opened.run, embeddings=bare),
            provenance={**provenance, "members": provenance["members"] * 2},
            store="the feature store gone.h5 is not there; name its new place with --store FILE.h5",
        )
        page = report_page(changed)
    notes = notes_of(page)
    command = f"onceover evaluate --run '{folder}' --split test"
    assert f"test was not evaluated yet; run: {command}" in notes
    assert notes.count("the feature store gone.h5 is not there; name its new place with --store FILE.h5") == 2
    assert sum("--set extract.thumbnails=true" in note for note in notes) == 2
    assert "an ensemble of 2 pairs" in page
    assert "<img" not in re.sub(r"<img[^>]*data:image/svg", "", page)
    assert f"left out: Results: test was not evaluated yet; run: {command}" in told


def test_a_store_that_is_gone_costs_its_part_and_one_that_is_named_in_vain_the_report(evaluated, tmp_path, fails):
    provenance = json.loads((evaluated / "run.json").read_text())
    with open_files(evaluated) as files:
        assert not isinstance(files.store, str)
    out = tmp_path / "report.html"
    line = fails("report", "--run", evaluated, "--out", out, "--store", tmp_path / "gone.h5")
    assert line == f"the feature store {tmp_path / 'gone.h5'} is not there; name its new place with --store FILE.h5"
    assert not out.exists()
    assert provenance["store"]


def test_text_of_others_is_never_markup(files):
    embeddings = files.run.embeddings
    captions = [HOSTILE[number % len(HOSTILE)] for number in range(len(embeddings.captions))]
    ids = [f"<b>{name}</b>" for name in embeddings.ids]
    hostile = dataclasses.replace(embeddings, captions=captions, ids=ids)
    page = report_page(dataclasses.replace(files, run=dataclasses.replace(files.run, embeddings=hostile)))
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>" not in page.replace("<b>Found first</b>", "").replace("<b>Its own captions</b>", "")
    assert "🐕 𝒳 {{ 7 * 7 }}" in page
    data = map_data(page)
    assert {row["caption"] for row in data["rows"]} <= set(HOSTILE)
    assert all(row["id"] in ids for row in data["rows"])


def test_a_strangers_file_stays_and_an_earlier_report_is_replaced(evaluated, tmp_path, fails, run, monkeypatch):
    monkeypatch.setattr(document, "report_page", lambda files: f"a page of {files.run.split}")
    out = tmp_path / "report.html"
    out.write_text("mine")
    line = fails("report", "--run", evaluated, "--out", out)
    assert line == f"{out} was not written by this program, and is left as it is; name another file for the report"
    assert out.read_text() == "mine"
    out.unlink()
    said = run("report", "--run", evaluated, "--out", out).stderr
    assert f"wrote {out} (0.0 MB)" in said
    assert "next: " in said
    assert out.read_text() == "a page of test"
    run("report", "--run", evaluated, "--split", "dev", "--out", out)
    assert out.read_text() == "a page of dev"
    out.write_text("a page of dev, with my note")
    assert "was changed since it was written" in fails("report", "--run", evaluated, "--out", out)
    assert out.read_text() == "a page of dev, with my note"


def test_a_file_that_is_no_page_and_files_that_are_no_run_or_sweep(evaluated, tmp_path, fails):
    assert fails("report", "--run", evaluated, "--out", tmp_path / "report.pdf").endswith(
        "report.pdf is not named as a page; name a file that ends in .html"
    )
    out = tmp_path / "report.html"
    assert "no run folder" in fails("report", "--run", tmp_path, "--out", out)
    assert "no run folder" in fails("report", "--run", evaluated, "--compare", tmp_path, "--out", out)
    assert "no images in the split 'nope'" in fails("report", "--run", evaluated, "--split", "nope", "--out", out)
    assert not out.exists()
    with open_files(evaluated, sweep=tmp_path) as files, pytest.raises(PlotError, match=r"results.csv"):
        sweep(files)


def test_queries_are_the_best_and_the_worst_of_both_directions(whole, files):
    page = whole.read_text(encoding="utf-8")
    searched = files.searched
    scores = searched.texts @ searched.images.T
    right = scores[np.arange(len(scores)), searched.image_index]
    scores[np.arange(len(scores)), searched.image_index] = -np.inf
    lead = right - scores.max(1)
    np.testing.assert_allclose(searched.caption_leads, lead, atol=1e-6)
    shown = [unescape(text) for text in re.findall(r"<bdi>“(.*?)”</bdi>", page)]
    assert shown[0] == searched.caption(int(lead.argmax()))
    assert shown[6] == searched.caption(int(searched.to_image.expected_rank().argmax()))
    own = searched.texts @ searched.images.T
    is_own = searched.image_index[:, None] == np.arange(len(searched.images))
    best_own = np.where(is_own, own, -np.inf).max(0)
    np.testing.assert_allclose(searched.image_leads, best_own - np.where(is_own, -np.inf, own).max(0), atol=1e-6)


def test_ranks_are_counted_once_in_a_band(files):
    bands = rank_bands(files)["table"]
    counts = np.array([[int(cell.text.split("(")[1].rstrip(")")) for cell in row[1:]] for row in bands.rows])
    assert counts.sum(0).tolist() == [len(files.searched.to_text.group), len(files.searched.texts)]
    assert counts[0, 1] == int((files.searched.to_image.expected_rank() < 2).sum())


def test_hubs_are_the_items_that_are_most_often_among_the_first_ten(files):
    images, captions = hubs(files)["galleries"]
    searched = files.searched
    first = np.argsort(-(searched.texts @ searched.images.T), axis=1)[:, :10]
    counts = np.bincount(first.ravel(), minlength=len(searched.images))
    assert [hub.times for hub in images["hubs"]] == np.sort(counts)[::-1][:10].tolist()
    assert images["never"] == int((counts == 0).sum())
    assert captions["mean"] == pytest.approx(10 * len(searched.images) / len(searched.texts))


def picture(seed, size=96):
    """A smooth random image."""
    noise = np.random.default_rng(seed).integers(0, 255, (7, 7, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image, quality=90):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


def test_near_duplicates_are_copies_of_another_size_brightness_or_compression_and_nothing_else():
    originals = [picture(seed) for seed in range(40)]
    darker = originals[3].point(lambda value: int(0.8 * value))
    cropped = originals[5].crop((2, 2, 94, 94))
    images = [*originals, originals[1].resize((64, 50)), darker, cropped, picture(99)]
    splits = ["train"] * 40 + ["test"] * 4
    thumbnails = [jpeg(image, 90 if number < 40 else 60) for number, image in enumerate(images)]
    search = near_duplicates([*thumbnails, b"no JPEG"], [*splits, "test"], "test")
    assert {(pair.reported, pair.other) for pair in search.pairs} == {(40, 1), (41, 3), (42, 5)}
    assert (search.reported, search.others) == (5, 40)
    assert all(0.7 <= pair.cosine <= 1.0001 for pair in search.pairs)
    assert near_duplicates(thumbnails, ["test"] * 44, "test").others == 0
    assert near_duplicates([b"", b""], ["test", "train"], "test").pairs == []


def test_similar_rows_become_neighbours_and_groups_are_named_by_their_words():
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, 3, 60)
    vectors = np.eye(3)[kinds] + 0.05 * generator.normal(size=(60, 3))
    order, groups = cluster_order(vectors)
    assert sorted(order.tolist()) == list(range(60))
    assert (np.diff(kinds[order]) != 0).sum() == 2  # each kind is one block
    assert (np.diff(groups) >= 0).all()
    words = [["a dog runs", "the snow falls", "a red car"][kind] for kind in np.sort(kinds)]
    named = telling_words(words, np.sort(kinds))
    assert named[0] in {"dog", "runs"}
    assert named[1] in {"the", "snow", "falls"}
    assert named[2] in {"red", "car"}
    assert telling_words(["雪が降る", "xy"], np.array([0, 1])) == {}


def test_cells_are_sorted_by_the_number_at_their_beginning():
    made = table("t", [["model_name", "R@1"], ["cca", "1,012.5 [3.0, 4.0]"], ["2 to 5", "–"], ["x", "-0.3"]])
    assert made.header == ["model_name", "R@1"]
    assert [cell.number for row in made.rows for cell in row] == [None, 1012.5, 2.0, None, None, -0.3]
