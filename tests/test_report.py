"""The report of a run: its numbers, what stands where a file is missing, and what it writes over."""

import base64
import dataclasses
import io
import json
import re
import shutil
from html import unescape

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from onceover.analysis.figures.similarity_ordered import cluster_order, telling_words
from onceover.analysis.map_points import map_points
from onceover.analysis.pages.tables import page_table
from onceover.analysis.report import document, error_page, figures, open_files
from onceover.analysis.report import files as files_module
from onceover.analysis.report.document import report_page
from onceover.analysis.report.files import NO_THUMBNAILS
from onceover.analysis.report.hubs import hubs
from onceover.analysis.report.map_section import map_section
from onceover.analysis.report.near_duplicates import near_duplicates
from onceover.analysis.report.queries import best, worst
from onceover.analysis.report.results import rank_bands
from onceover.base.files import read_record
from onceover.base.terminal import Table
from onceover.retrieval.comparison import compare_runs
from onceover.retrieval.tables import comparison_tables, evaluation_tables

HOSTILE = [
    "<script>alert(1)</script>",
    "\"quoted\" & 'so' </script><img src=x onerror=alert(1)>",
    "שלום עולם",
    "🐕 𝒳 {{ 7 * 7 }}",
    "a dog \x1b[31m",
]
SIDE = {"queries": 12, "gallery": 60, "R@1": 1.0, "R@5": 2.0, "R@10": 3.0}
OLD = {"split": "test", "models": {"multimodal": {"image_to_text": SIDE, "text_to_image": SIDE}}}  # lacks its rsum


@pytest.fixture
def files(evaluated_run):
    with open_files(evaluated_run) as opened:
        yield opened


@pytest.fixture
def no_figures(monkeypatch):
    """Leaves out what takes the time of a page."""
    monkeypatch.setattr(figures, "draw_svg", lambda draw: (Figure(), b"<svg/>"))


def tables_of(page):
    """The tables of a page by title: rows of text, the header first."""
    tables = {}
    for title, head, body in re.findall(
        r'aria-label="([^"]*)">\s*<thead>(.*?)</thead>\s*<tbody>(.*?)</tbody>', page, re.DOTALL
    ):
        rows = [re.findall(r"<th[^>]*>(.*?)</th>", head)]
        rows += [
            re.findall(r"<t[hd] [^>]*>(.*?)</t[hd]>", row)
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL)
        ]
        tables[unescape(title)] = [[unescape(cell).replace("−", "-") for cell in row] for row in rows]
    return tables


def notes_of(page):
    return [unescape(text) for text in re.findall(r'<p class="note">(.*?)</p>', page, re.DOTALL)]


def map_data(page):
    return json.loads(re.search(r'id="map-data">(.*?)</script>', page, re.DOTALL)[1])


def test_its_numbers_are_those_of_the_evaluation_and_of_the_comparison(report_file, evaluated_run, compared_run, files):
    page = report_file.read_text(encoding="utf-8")
    tables = tables_of(page)
    result = read_record(evaluated_run / "evaluation-test.json", "the evaluation")
    for table in evaluation_tables(result):
        assert tables[table.title] == table.rows
    assert "rsum: the sum of R@1, R@5 and R@10 of both directions" in page
    embeddings = files.run.embeddings
    compared = compare_runs({str(evaluated_run): embeddings, str(compared_run): embeddings})
    (comparison,) = comparison_tables(compared)
    assert tables[f"{compared_run} against {evaluated_run}"] == comparison.rows
    numbers = result["models"]["multimodal"]["image_to_text"]
    low, high = numbers["R@1_ci"]
    interval = f'<span class="interval">{low:.1f} to {high:.1f}</span>'
    assert f"<dt>R@1</dt><dd>{numbers['R@1']:.1f} {interval}</dd>" in page


def test_a_sweep_is_shown_with_its_ties_and_its_settings_as_they_were_written(report_file):
    header, *rows = tables_of(report_file.read_text(encoding="utf-8"))["The best settings"]
    assert header[:4] == ["place", "setting", "image → caption R@1", "caption → image R@1"]
    assert [row[1] for row in rows][:2] == ["temperature=0.03 weight_decay=3e-05", "temperature=0.07 weight_decay=0.1"]
    assert [row[-1] for row in rows] == ["best", "tie", "dropped", "diverged"]
    assert rows[1][5] == "-1.0 [-2.5, +0.5]"


def test_it_is_one_file_that_needs_nothing_else_and_holds_every_part(report_file):
    page = report_file.read_text(encoding="utf-8")
    titles = re.findall(r'<h2 id="\w+-title">(.*?)</h2>', page)
    assert titles == [
        "What was run", "Results", "Comparison", "Map", "Best and worst queries", "Hubs", "Ranks", "Similarity",
        "Training", "Sweep", "Health of the feature store", "Settings and provenance",
    ]  # fmt: skip
    assert notes_of(page) == ["The map is drawn by a script, and scripts are switched off here."]
    assert page.count("data:image/svg+xml;base64,") == 7  # models, ranks, similarity, training; three of the sweep
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page
    assert report_file.stat().st_size < 2_000_000


def test_the_map_holds_a_fifth_of_other_splits_with_the_ranks_of_the_reported_one(files):
    section = map_section(files)
    rows = section["data"]["rows"]
    embeddings = files.run.embeddings
    pairs = map_points(files.run).pairs
    assert [row["split"] for row in rows] == [embeddings.splits[image] for image in pairs.images]
    assert [row["caption"] for row in rows] == [embeddings.captions[caption] for caption in pairs.captions]
    ranks = np.rint(files.searched.to_text.expected_rank()).tolist()
    assert [row["ranks"][0] for row in rows if row["split"] == "test"] == ranks
    assert {tuple(row["ranks"]) for row in rows if row["split"] != "test"} == {(None, None)}
    assert section["shown"].startswith("Shown are ")
    few = map_points(files.run, 10)
    assert [embeddings.splits[row] for row in few.pairs.images].count("test") == 8
    assert len(set(few.pairs.images.tolist())) == 10
    assert (embeddings.image_index[few.pairs.captions] == few.pairs.images).all()
    assert few.coordinates["tsne"].shape == few.coordinates["pca"].shape == (20, 2)


def test_what_is_missing_is_a_note_that_names_the_command(run_dir, tmp_path, told, no_figures):
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
    assert notes.count(NO_THUMBNAILS) == 2
    assert "an ensemble of 2 pairs" in page
    assert "<img" not in re.sub(r"<img[^>]*data:image/svg", "", page)
    assert f"left out: Results: test was not evaluated yet; run: {command}" in told


def test_a_store_that_is_gone_costs_its_part_and_one_that_is_named_in_vain_the_report(evaluated_run, tmp_path, fails):
    provenance = json.loads((evaluated_run / "run.json").read_text())
    with open_files(evaluated_run) as files:
        assert not isinstance(files.store, str)
    out = tmp_path / "report.html"
    line = fails("report", "--run", evaluated_run, "--out", out, "--store", tmp_path / "gone.h5")
    assert line == f"the feature store {tmp_path / 'gone.h5'} is not there; name its new place with --store FILE.h5"
    assert not out.exists()
    assert provenance["store"]


def test_text_of_others_is_never_markup(files, no_figures):
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
    assert "\x1b" not in page
    assert "a dog ␛[31m" in page


def test_a_strangers_file_stays_and_an_earlier_report_is_replaced(evaluated_run, tmp_path, fails, run, monkeypatch):
    monkeypatch.setattr(document, "report_page", lambda files: f"a page of {files.run.split}")
    out = tmp_path / "report.html"
    out.write_text("mine")
    line = fails("report", "--run", evaluated_run, "--out", out)
    assert line == f"{out} was not written by this program, and is left as it is; name another file for the report"
    assert out.read_text() == "mine"
    out.unlink()
    said = run("report", "--run", evaluated_run, "--out", out).stderr
    assert f"wrote {out} (0.0 MB)" in said
    assert "next: " in said
    assert out.read_text() == "a page of test"
    run("report", "--run", evaluated_run, "--split", "dev", "--out", out)
    assert out.read_text() == "a page of dev"
    out.write_text("a page of dev, with my note")
    assert "was changed since it was written" in fails("report", "--run", evaluated_run, "--out", out)
    assert out.read_text() == "a page of dev, with my note"


def test_a_file_that_is_no_page_and_files_that_are_no_run_or_sweep(evaluated_run, tmp_path, fails):
    assert fails("report", "--run", evaluated_run, "--out", tmp_path / "report.pdf").endswith(
        "report.pdf is not named as a page; name a file that ends in .html"
    )
    out = tmp_path / "report.html"
    assert "no run folder" in fails("report", "--run", tmp_path, "--out", out)
    assert "no run folder" in fails("report", "--run", evaluated_run, "--compare", tmp_path, "--out", out)
    assert "no images in the split 'nope'" in fails("report", "--run", evaluated_run, "--split", "nope", "--out", out)
    assert not out.exists()
    assert fails("report", "--run", evaluated_run, "--sweep", tmp_path, "--out", out).startswith(
        f"{tmp_path / 'results.csv'} is missing or damaged"
    )
    line = f"--compare {evaluated_run} names the run that is reported; name another run"
    assert fails("report", "--run", evaluated_run, "--compare", evaluated_run, "--out", out) == line
    errors = evaluated_run / "errors-test.html"
    line = f"{errors} is the name of the run's page of errors; name another file for the report"
    assert fails("report", "--run", evaluated_run, "--out", errors) == line


def test_queries_are_the_best_and_the_worst_of_both_directions(report_file, files):
    page = report_file.read_text(encoding="utf-8")
    searched = files.searched
    scores = searched.texts @ searched.images.T
    right = scores[np.arange(len(scores)), searched.image_index]
    scores[np.arange(len(scores)), searched.image_index] = -np.inf
    lead = right - scores.max(1)
    np.testing.assert_allclose(searched.caption_leads, lead, atol=1e-6)
    halves = page.partition('<section id="queries"')[2].split("Caption → image: the worst")
    shown = [[unescape(text) for text in re.findall(r"<bdi>“(.*?)”</bdi>", half)] for half in halves]
    assert shown[0][0] == searched.caption(int(lead.argmax()))
    assert shown[1][0] == searched.caption(int(searched.to_image.expected_rank().argmax()))
    for queries in (best(searched.to_image, searched.caption_leads, 6), worst(searched.to_image, 6)):
        assert len(set(searched.image_index[queries].tolist())) == len(queries) > 2  # one of each image
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


def test_a_column_has_numbers_where_all_its_cells_begin_with_one():
    rows = [
        ["model_name", "R@1", "run", "large"],
        ["cca", "1,012.5 [3.0, 4.0]", "2024-run", "1e999"],
        ["7", "–", "3", "2"],
        ["x", "-0.3 [-1.0, 2-3]", "3", "2"],
    ]
    made = page_table(Table("t", rows))
    assert (made.title, made.header) == ("t", rows[0])
    assert [[cell.number for cell in row] for row in made.rows] == [
        [None, 1012.5, None, None], [None, None, None, 2.0], [None, -0.3, None, 2.0],
    ]  # fmt: skip
    assert [row[1].indent for row in made.rows] == [0, 4, 3]
    assert [row[1].text for row in made.rows] == ["1,012.5 [3.0, 4.0]", "–", "−0.3 [−1.0, 2-3]"]
    assert page_table(Table("t", [["only", "a header"]])).rows == []


def test_damaged_thumbnails_are_counted_and_not_shown(files, told, no_figures):
    embeddings = files.run.embeddings
    thumbnails = [embeddings.thumbnails[row] for row in range(len(embeddings.ids))]
    for row in np.flatnonzero(np.array(embeddings.splits) == "test")[:5].tolist():
        thumbnails[row] = thumbnails[row][:200]
    run = dataclasses.replace(files.run, embeddings=dataclasses.replace(embeddings, thumbnails=thumbnails))
    page = report_page(dataclasses.replace(files, run=run))
    line = "5 thumbnails of the run cannot be decoded, and are not shown; to mend them, extract and fit again"
    assert notes_of(page)[0] == line
    assert line in told
    shown = re.findall(r'(?:src="|")data:image/jpeg;base64,([^"]*)', page)
    assert shown
    for data in shown:
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    errors = error_page(run.embeddings, "test", 12)
    assert "cannot be decoded, and are not shown" in errors


@pytest.mark.parametrize("damage", [lambda file: file.read_text()[:-20], lambda file: json.dumps(OLD)])
def test_a_damaged_or_old_evaluation_costs_the_results_alone(evaluated_run, tmp_path, damage, no_figures):
    folder = shutil.copytree(evaluated_run, tmp_path / "run")
    file = folder / "evaluation-test.json"
    file.write_text(damage(file))
    with open_files(folder) as opened:
        page = report_page(opened)
    notes = notes_of(page)
    assert sum(str(file) in note for note in notes) == 1, notes
    assert "<dt>image encoder</dt>" in page


def test_a_run_of_other_images_is_refused_by_its_name(evaluated_run, tmp_path, fails, run_dir, monkeypatch):
    other = shutil.copytree(run_dir, tmp_path / "other")
    read = files_module.read_embeddings

    def without_test(path):
        return dataclasses.replace(read(path), splits=["train"] * 60)

    monkeypatch.setattr(files_module, "read_embeddings", without_test)
    out = tmp_path / "report.html"
    line = fails("report", "--run", evaluated_run, "--compare", other, "--out", out)
    assert line == f"{other}: the run has no images in the split 'test'; its splits: train"
    assert not out.exists()
