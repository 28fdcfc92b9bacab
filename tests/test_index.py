"""Indexes on disk: exact where they say so, refused where they are not good enough, whole at every moment."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onceover.base.files import FileError, only_writer, write_record
from onceover.base.formats import CURRENT
from onceover.base.outputs import OutputError
from onceover.retrieval.exact import QueryError, exact_search
from onceover.retrieval.gallery import Gallery
from onceover.retrieval.index import (
    TYPES,
    Index,
    IndexingError,
    check_vanished,
    choose_type,
    claim_index,
    compact,
    faiss_files,
    read_manifest,
    remove,
    types,
    update,
    updating,
)
from onceover.retrieval.index import manifest as manifests
from onceover.retrieval.index import rows as rows_module
from onceover.retrieval.index.folder import IndexFiles

ROOT = Path(__file__).resolve().parent.parent
ROOMY = {"memory": 2**40, "run": "runs/first", "source": "here"}


def unit(generator, rows, dim=24):
    vectors = generator.standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def gallery(rows=200, seed=0, first=0, space="s", **changes):
    names = [f"p{number}" for number in range(first, first + rows)]
    columns = {
        "kind": "image",
        "vectors": unit(np.random.default_rng([seed, first]), rows),
        "biased": False,
        "ids": names,
        "paths": [f"images/{name}.jpg" for name in names],
        "captions": [[f"says {name}"] * (number % 3) for number, name in enumerate(names)],
        "contents": [f"hash of {name}" for name in names],
        "thumbnails": [f"jpeg {name}".encode() for name in names],
        "space": space,
    }
    return Gallery(**columns | changes)


def joined(one, two):
    columns = {
        name: [*getattr(one, name), *getattr(two, name)]
        for name in ("ids", "paths", "captions", "contents", "thumbnails")
    }
    return Gallery(one.kind, np.concatenate([one.vectors, two.vectors]), one.biased, space=one.space, **columns)


@pytest.fixture
def probes():
    return unit(np.random.default_rng(5), 60)


def found_ids(index, queries, k):
    return [[index.item(row)["id"] for row in rows.tolist()] for _, rows in index.search(queries, k)]


def exact_ids(of, queries, k, without=()):
    scores = queries @ of.vectors.T
    scores[:, [row for row, name in enumerate(of.ids) if name in set(without)]] = -np.inf
    return [[of.ids[row] for row in order[:k]] for order in np.argsort(-scores, axis=1, kind="stable")]


def recall(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)])


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_finds_what_exact_search_finds_and_shows_its_rows(tmp_path, probes, kind):
    items = gallery(900)
    made = update(tmp_path / "i", items, probes, kind=kind, min_recall=0.9, **ROOMY)
    assert (made.added, made.removed, made.rows, made.up_to_date) == (900, 0, 900, False)
    index = Index(tmp_path / "i")
    assert len(index) == 900
    found = found_ids(index, probes, 10)
    measured = recall(found, exact_ids(items, probes, 10))
    assert made.manifest["recall@10"] == pytest.approx(measured)
    assert measured == 1.0 if kind == "flat" else measured >= 0.9
    scores, rows = index.search(probes[:1], 3)[0]
    tolerance = 3e-4 if kind == "ivf16" else 1e-4
    np.testing.assert_allclose(scores, np.sort(items.vectors @ probes[0])[::-1][:3], rtol=tolerance)
    assert index.item(int(rows[0])) == items.item(int(rows[0]))


def test_an_approximate_index_under_the_floor_is_refused_and_the_old_one_stays(tmp_path, probes, monkeypatch):
    update(tmp_path / "i", gallery(300), probes, **ROOMY)
    monkeypatch.setitem(types.EFFORTS, "ivf", (1,))
    before = read_manifest(tmp_path / "i")
    with pytest.raises(IndexingError, match=r"is 0\.\d+, under 0.99; use --type hnsw or flat, or lower --min-recall"):
        update(tmp_path / "i", gallery(3000), probes, kind="ivf", min_recall=0.99, **ROOMY)
    assert read_manifest(tmp_path / "i") == before
    assert len(Index(tmp_path / "i")) == 300


def test_effort_is_raised_until_the_recall_suffices(tmp_path, probes):
    low = update(tmp_path / "a", gallery(3000), probes, kind="ivf", min_recall=0.3, **ROOMY).manifest
    high = update(tmp_path / "b", gallery(3000), probes, kind="ivf", min_recall=0.95, **ROOMY).manifest
    assert low["segments"][0]["effort"] < high["segments"][0]["effort"]
    assert 0.3 <= low["recall@10"] < 0.95 <= high["recall@10"]


def test_new_rows_join_changed_ones_are_replaced_and_missing_ones_go(tmp_path, probes):
    folder, old = tmp_path / "i", gallery(200)
    update(folder, old, probes, **ROOMY)
    files = set(folder.glob("000001.*"))
    more = joined(old, gallery(30, first=200))
    made = update(folder, more, probes, **ROOMY)
    assert (made.added, made.removed) == (30, 0)
    assert [entry["rows"] for entry in made.manifest["segments"]] == [200, 30]
    assert files <= set(folder.glob("000001.*"))  # the first segment was not touched
    assert found_ids(Index(folder), probes, 7) == exact_ids(more, probes, 7)
    more.captions[4] = ["another sentence"]
    more.vectors[9] = unit(np.random.default_rng(8), 1)[0]
    kept = more.take(np.arange(3, 230))
    made = update(folder, kept, probes, **ROOMY)
    assert (made.added, made.removed) == (2, 5)  # p4 and p9 anew; p0, p1, p2 and the old p4 and p9 gone
    index = Index(folder)
    assert len(index) == 227
    assert found_ids(index, probes, 12) == exact_ids(kept, probes, 12)
    shown = {index.item(int(rows[0]))["id"]: index.item(int(rows[0])) for _, rows in index.search(kept.vectors, 1)}
    assert shown["p4"]["captions"] == ["another sentence"]
    assert update(folder, kept, probes, **ROOMY).up_to_date
    halved = kept.take(np.arange(100))
    assert len(update(folder, halved, probes, **ROOMY).manifest["segments"]) == 1  # more gone than kept: built anew


@pytest.mark.parametrize("kind", TYPES)
def test_removed_rows_are_never_found_and_every_query_still_gets_its_hits(tmp_path, probes, kind):
    folder, items = tmp_path / "i", gallery(400)
    update(folder, items, probes, kind=kind, min_recall=0.8, **ROOMY)
    gone = sorted({name for ids in exact_ids(items, probes, 5) for name in ids})  # the best of every query
    made = remove(folder, gone, probes)
    assert (made.removed, made.rows) == (len(gone), 400 - len(gone))
    index = Index(folder)
    found = found_ids(index, probes, 10)
    assert not {name for ids in found for name in ids} & set(gone)
    assert {len(ids) for ids in found} == {10}
    assert recall(found, exact_ids(items, probes, 10, without=gone)) > 0.8
    assert len(index) == len(index.ids()) == 400 - len(gone)
    assert remove(folder, [index.ids()[0]], probes).rows == 399 - len(gone)  # tombstones add up
    made = compact(folder, probes)
    assert [entry["rows"] for entry in made.manifest["segments"]] == [399 - len(gone)]
    index = Index(folder)
    assert not set(index.ids()) & set(gone)
    rows = {name: row for row, name in enumerate(items.ids)}
    _, best = index.search(probes[:1], 1)[0]
    assert index.item(int(best[0])) == items.item(rows[index.item(int(best[0]))["id"]])
    assert compact(folder, probes).up_to_date


def test_trap_more_hits_than_items_and_removed_ones_leave_no_row_minus_one(tmp_path, probes):
    for kind in TYPES:
        folder = tmp_path / kind
        update(folder, gallery(300), probes, kind=kind, min_recall=0.5, **ROOMY)
        remove(folder, [f"p{number}" for number in range(0, 300, 2)], probes)
        for scores, rows in Index(folder).search(probes, 1000):
            assert len(rows) == len(set(rows.tolist())) == 150
            assert rows.min() >= 0
            assert np.isfinite(scores).all()
            assert (np.diff(scores) <= 1e-6).all()


@given(st.lists(st.sampled_from(["add", "remove", "change", "compact"]), min_size=1, max_size=6), st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_whatever_happens_to_an_index_it_finds_what_a_fresh_search_finds(tmp_path_factory, steps, seed):
    folder, generator, probes = (
        tmp_path_factory.mktemp("i") / "i",
        np.random.default_rng([seed, 77]),
        unit(np.random.default_rng(1), 9),
    )
    items = gallery(40, seed)
    update(folder, items, probes, **ROOMY)
    for number, step in enumerate(steps):
        if step == "add":
            items = joined(items, gallery(7, seed, first=1000 + 10 * number))
            update(folder, items, probes, **ROOMY)
        elif step == "remove":
            gone = generator.permutation(len(items))[:3]
            remove(folder, [items.ids[row] for row in gone], probes)
            items = items.take(np.setdiff1d(np.arange(len(items)), gone))
        elif step == "change":
            items.vectors[int(generator.integers(len(items)))] = unit(generator, 1)[0]
            update(folder, items, probes, **ROOMY)
        else:
            compact(folder, probes)
    assert found_ids(Index(folder), probes, 5) == exact_ids(items, probes, 5)


def test_the_type_is_chosen_by_size_and_memory_and_says_why():
    assert choose_type(1000, 512, 2**30)[0] == "flat"
    assert choose_type(10**6, 512, 2**32)[0] == "hnsw"
    assert choose_type(10**6, 512, 2_150_000_000)[0] == "ivf"
    name, reason = choose_type(10**6, 512, 2**28)
    assert name == "ivfpq"
    assert reason == "1,000,000 rows: no room for vectors, it takes 73 of 256 MiB"
    assert choose_type(1000, 512, 10**6)[0] != "flat"
    name, reason = choose_type(10**6, 512, 10**7)
    assert name == "ivf16"
    assert reason.endswith("no room for quantized vectors, the lists stay on the disk, it takes 4 of 10 MiB")
    with pytest.raises(IndexingError, match="even with its lists on the disk, the index takes 4 of 1 MiB; raise"):
        choose_type(10**6, 512, 2**20)


def test_auto_is_decided_anew_and_an_asked_type_is_kept(tmp_path, probes, monkeypatch, told):
    auto = update(tmp_path / "a", gallery(300), probes, **ROOMY).manifest
    asked = update(tmp_path / "b", gallery(300), probes, kind="hnsw", **ROOMY).manifest
    assert (auto["type"], asked["type"]) == ("flat", "hnsw")
    monkeypatch.setattr(types, "FLAT_ROWS", 100)
    again = update(tmp_path / "a", gallery(300), probes, **ROOMY).manifest
    assert again["type"] == "hnsw"
    assert "building it anew: type changed" in told
    assert update(tmp_path / "b", gallery(300), probes, **ROOMY).up_to_date


def test_few_new_rows_beside_an_approximate_index_are_searched_exactly(tmp_path, probes):
    update(tmp_path / "i", gallery(300), probes, kind="hnsw", **ROOMY)
    made = update(tmp_path / "i", joined(gallery(300), gallery(20, first=300)), probes, **ROOMY)
    assert [entry["type"] for entry in made.manifest["segments"]] == ["hnsw", "flat"]


def test_trap_a_file_that_was_changed_is_refused_before_faiss_sees_a_byte(tmp_path, probes, monkeypatch):
    update(tmp_path / "i", gallery(300), probes, kind="ivfpq", min_recall=0, **ROOMY)
    remove(tmp_path / "i", ["p3"], probes)
    monkeypatch.setattr(faiss_files.faiss, "read_index", lambda *_: pytest.fail("faiss was handed damaged bytes"))
    current = json.loads((tmp_path / "i" / CURRENT).read_text())
    names = [current["manifest"], *read_manifest(tmp_path / "i")["segments"][0]["files"]]
    assert {name.rpartition(".")[2] for name in names} == {"json", "faiss", "h5", "npy"}
    for name in names:
        folder = shutil.copytree(tmp_path / "i", tmp_path / f"broken {name}")
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(IndexingError, match="does not match its SHA-256"):
            Index(folder)
        (folder / name).unlink()
        with pytest.raises(IndexingError, match="is missing; build it again: index with --force"):
            Index(folder)


def test_trap_the_index_holds_ids_metric_normalisation_and_the_hash_of_its_vectors(tmp_path, probes):
    made = update(tmp_path / "i", gallery(50), probes, **ROOMY).manifest
    assert (made["metric"], made["normalised"], made["dim"], made["kind"]) == ("inner product", True, 24, "image")
    assert (made["space"], made["source"], made["run"]) == ("s", "here", "runs/first")
    assert made["segments"][0]["vectors_sha256"] == hashlib.sha256(gallery(50).vectors.tobytes()).hexdigest()
    assert Index(tmp_path / "i").ids() == gallery(50).ids


DYING = """
import os, sys
sys.path.insert(0, {tests!r})
import test_index
from onceover.retrieval.index import update
real = os.replace
probes = test_index.unit(test_index.np.random.default_rng(5), 60)
for step in {steps}:
    if os.fork() == 0:
        left = step
        def replace(source, target):  # every file appears by it
            global left
            left -= 1
            if left < 0:
                os._exit(9)
            real(source, target)
        os.replace = replace
        update({folder!r}, test_index.grown(), probes, **test_index.ROOMY)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def dying_at(steps, folder):
    """Gives the exit codes of updates of an index that are killed at one step each, one after the other."""
    script = DYING.format(tests=str(ROOT / "tests"), steps=list(steps), folder=str(folder))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:

        def codes():
            for line in process.stdout:
                yield int(line)
                process.stdin.write("next\n")
                process.stdin.flush()

        yield codes()
        process.stdin.close()


def grown():
    return joined(gallery(60), gallery(9, first=60))


def test_trap_killed_while_writing_the_last_version_stays_whole(tmp_path, probes):
    update(tmp_path / "i", gallery(60), probes, **ROOMY)
    codes = []
    with dying_at(range(8), tmp_path / "i") as exits:
        for code in exits:
            codes.append(code)
            if code == 0:
                continue
            assert code == 9
            assert found_ids(Index(tmp_path / "i"), probes, 5) == exact_ids(gallery(60), probes, 5)
    assert codes == [9, 9, 9, 9, 9, 9, 0, 0]  # list, rows, faiss file, list, manifest, pointer
    used = {name for entry in read_manifest(tmp_path / "i")["segments"] for name in entry["files"]}
    assert {file.name for file in (tmp_path / "i").iterdir() if file.suffix in (".h5", ".faiss")} == used
    assert not (tmp_path / "i/pending.json").exists()
    assert found_ids(Index(tmp_path / "i"), probes, 5) == exact_ids(grown(), probes, 5)


def test_who_has_an_index_open_goes_on_while_newer_versions_appear(tmp_path, probes):
    folder, items = tmp_path / "i", gallery(100)
    update(folder, items, probes, **ROOMY)
    reader = Index(folder)
    for number in range(3):
        items = joined(items, gallery(400 * (number + 1), first=5000 * (number + 1)))
        update(folder, items, probes, **ROOMY)
    assert found_ids(reader, probes, 5) == exact_ids(gallery(100), probes, 5)
    assert len(list(folder.glob("*.faiss"))) == 2  # what neither this version nor the last one uses is cleared away


def test_a_second_writer_other_sources_and_unusable_galleries_are_refused(tmp_path, probes):
    update(tmp_path / "i", gallery(20), probes, **ROOMY)
    with only_writer(tmp_path / "i", "the index"), pytest.raises(FileError, match="another process is writing"):
        update(tmp_path / "i", gallery(21), probes, **ROOMY)
    with pytest.raises(IndexingError, match="indexes here, not there; name another --index, or --force"):
        update(tmp_path / "i", gallery(20), probes, **ROOMY | {"source": "there"})
    assert update(tmp_path / "i", gallery(20), probes, force=True, **ROOMY | {"source": "there"}).added == 20
    with pytest.raises(IndexingError, match="several items of the gallery have the same id"):
        update(tmp_path / "j", gallery(3, ids=["a", "a", "b"]), probes, **ROOMY)
    with pytest.raises(IndexingError, match="holds nothing to index"):
        update(tmp_path / "j", gallery(0), probes, **ROOMY)
    with pytest.raises(IndexingError, match="holds no 'x' and 1 more"):
        remove(tmp_path / "i", ["p1", "x", "y"], probes)
    with pytest.raises(IndexingError, match="would leave nothing"):
        remove(tmp_path / "i", [f"p{number}" for number in range(20)], probes)
    with pytest.raises(IndexingError, match="there is no index at"):
        Index(tmp_path / "none")
    assert not (tmp_path / "j" / CURRENT).exists()


def test_other_heads_or_a_correction_for_hubs_build_it_anew(tmp_path, probes, told):
    update(tmp_path / "i", gallery(20), probes, **ROOMY)
    with pytest.raises(IndexingError, match="was made with the run runs/first; name that one, another --index"):
        update(tmp_path / "i", gallery(20, space="other"), probes, **ROOMY | {"run": "runs/second"})
    update(tmp_path / "i", gallery(20, space="other"), probes, **ROOMY)  # the run was fitted again
    assert "building it anew: space changed" in told
    biased = np.column_stack([gallery(20).vectors, np.arange(20, dtype=np.float32)])
    queries = np.column_stack([probes, np.ones(60, np.float32)])
    made = update(tmp_path / "i", gallery(20, vectors=biased, biased=True, space="other"), queries, **ROOMY)
    assert made.manifest["biased"]
    assert found_ids(Index(tmp_path / "i"), queries[:1], 20)[0][0] == "p19"


def test_queries_of_the_wrong_shape_or_not_finite_are_refused(tmp_path, probes):
    update(tmp_path / "i", gallery(20), probes, **ROOMY)
    index = Index(tmp_path / "i")
    with pytest.raises(QueryError, match="do not fit a gallery of 24 dimensions"):
        index.search(probes[:, :7], 3)
    with pytest.raises(QueryError, match="not finite"):
        index.search(np.full((1, 24), np.nan), 3)


def test_a_full_disk_leaves_the_last_version(tmp_path, probes, monkeypatch):
    update(tmp_path / "i", gallery(50), probes, **ROOMY)

    def full(index, path):
        raise RuntimeError("Error: 'ret == (size)' failed: write error")

    monkeypatch.setattr(faiss_files.faiss, "write_index", full)
    with pytest.raises(IndexingError, match="could not be written; is the disk full"):
        update(tmp_path / "i", gallery(80), probes, **ROOMY)
    assert len(Index(tmp_path / "i")) == 50


def test_thumbnails_may_be_missing_and_captions_need_no_picture(tmp_path, probes):
    items = gallery(20, kind="text", thumbnails=None, paths=[""] * 20)
    update(tmp_path / "i", items, probes, **ROOMY)
    assert Index(tmp_path / "i").item(3) == items.item(3)
    with h5py.File(tmp_path / "i/000001.h5") as file:
        assert "thumbnail" not in file


@pytest.mark.parametrize("change", [remove, compact, update], ids=lambda change: change.__name__)
@pytest.mark.parametrize("damaged", ["manifest", CURRENT])
def test_trap_a_refused_change_of_a_damaged_index_deletes_nothing(tmp_path, probes, change, damaged):
    folder = tmp_path / "i"
    update(folder, gallery(50), probes, **ROOMY)
    remove(folder, ["p3"], probes)
    name = json.loads((folder / CURRENT).read_text())["manifest"] if damaged == "manifest" else CURRENT
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(b"x" + whole)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    given = {remove: (["p1"], probes), compact: (probes,), update: (gallery(51), probes)}[change]
    with pytest.raises(IndexingError, match="build it again: index with --force"):
        change(folder, *given, **ROOMY if change is update else {})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder / name).write_bytes(whole)  # the error passed
    assert len(Index(folder)) == 49


def test_what_fails_once_the_new_version_is_there_leaves_it_whole(tmp_path, probes, monkeypatch):
    folder = tmp_path / "i"
    update(folder, gallery(50), probes, **ROOMY)

    def interrupted(files, versions):
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexFiles, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(folder, gallery(51), probes, **ROOMY)
    assert len(Index(folder)) == 51


def test_files_stay_while_a_manifest_cannot_be_read_and_go_once_it_can(tmp_path, probes, monkeypatch):
    folder = tmp_path / "i"
    update(folder, gallery(50), probes, **ROOMY)
    (folder / "000009.h5").write_bytes(b"of a killed process")
    write_record(folder / "pending.json", {"format": "onceover index, files under way", "files": ["000009.h5"]})

    def unreadable(path, what):
        if what == "a manifest":
            raise FileError(f"{path}: Input/output error")
        return json.loads(path.read_text())

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "read_json", unreadable)
        update(folder, gallery(51), probes, **ROOMY)
    assert (folder / "000009.h5").exists()
    assert len(Index(folder)) == 51
    update(folder, gallery(52), probes, **ROOMY)
    assert not (folder / "000009.h5").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"manifest": 3}', "no manifest"], ids=["cut", "list", "format", "key"])
def test_a_damaged_pointer_is_refused_and_replaced_with_force(tmp_path, probes, text):
    folder = tmp_path / "i"
    update(folder, gallery(50), probes, **ROOMY)
    if text == "no manifest":
        text = json.dumps({**json.loads((folder / CURRENT).read_text()), "manifest": None})
    (folder / CURRENT).write_text(text)
    for change in (lambda: Index(folder), lambda: update(folder, gallery(50), probes, **ROOMY)):
        with pytest.raises(IndexingError, match="build it again: index with --force"):
            change()
    made = update(folder, gallery(50), probes, force=True, **ROOMY).manifest
    assert len(Index(folder)) == 50
    assert len(list(folder.glob("manifest-*.json"))) == 1
    assert {file.name for file in folder.glob("[0-9]*.*")} == set(made["segments"][0]["files"])


@pytest.mark.parametrize("kind", TYPES)
def test_so_much_may_be_removed_that_fewer_than_ten_rows_stay(tmp_path, probes, kind):
    folder = tmp_path / "i"
    update(folder, gallery(300), probes, kind=kind, min_recall=0.5, **ROOMY)
    made = remove(folder, [f"p{number}" for number in range(4, 300)], probes)
    assert (made.rows, made.manifest["recall@10"]) == (4, 1.0)
    assert found_ids(Index(folder), probes, 10) == exact_ids(gallery(300).take(np.arange(4)), probes, 10)


@pytest.mark.parametrize("name", ["000001.faiss", "000001.h5", "manifest"])
def test_a_damaged_index_is_built_again_with_force(tmp_path, probes, name):
    folder = tmp_path / "i"
    update(folder, gallery(50), probes, **ROOMY)
    name = json.loads((folder / CURRENT).read_text())["manifest"] if name == "manifest" else name
    (folder / name).write_bytes(b"{" + (folder / name).read_bytes())
    with pytest.raises(IndexingError, match="build it again: index with --force"):
        update(folder, gallery(51), probes, **ROOMY)
    update(folder, gallery(51), probes, force=True, **ROOMY)
    assert found_ids(Index(folder), probes, 3) == exact_ids(gallery(51), probes, 3)


def test_recall_and_floor_are_remembered_and_held(tmp_path, probes):
    folder, wanted = tmp_path / "i", {"kind": "ivf", "min_recall": 0.3}
    first = update(folder, gallery(3000), probes, **wanted, **ROOMY).manifest
    assert update(folder, gallery(3000), probes, **ROOMY).up_to_date
    remove(folder, ["p1"], probes)
    assert Index(folder).manifest["segments"][0]["effort"] == first["segments"][0]["effort"]
    raised = update(folder, gallery(3000).take(np.r_[0, 2:3000]), probes, min_recall=0.95, **ROOMY)
    assert (raised.added, raised.removed, raised.up_to_date) == (0, 0, False)
    assert raised.manifest["recall@10"] >= 0.95
    moved = update(folder, gallery(3000).take(np.r_[0, 2:3000]), probes, **ROOMY | {"run": "elsewhere"})
    assert moved.manifest["run"] == "elsewhere"
    nothing = update(tmp_path / "j", gallery(300), probes, min_recall=0, **ROOMY)
    assert nothing.manifest["recall@10"] == 1.0


def test_copies_are_equally_good_answers_when_recall_is_measured(tmp_path, probes):
    items = gallery(1000)
    items.vectors[:] = items.vectors[np.arange(1000) % 40]
    assert update(tmp_path / "i", items, probes, kind="hnsw", **ROOMY).manifest["recall@10"] >= 0.95


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 255])
def test_a_gallery_too_small_to_train_on_is_searched_exactly(tmp_path, probes, kind, rows):
    made = update(tmp_path / "i", gallery(rows), probes, kind=kind, **ROOMY)
    assert (made.manifest["type"], made.manifest["segments"][0]["type"]) == (kind, "flat")
    assert found_ids(Index(tmp_path / "i"), probes, 5) == exact_ids(gallery(rows), probes, 5)


def test_many_small_changes_end_in_one_segment_again(tmp_path, probes):
    folder, items = tmp_path / "i", gallery(100)
    update(folder, items, probes, **ROOMY)
    most = 0
    for number in range(updating.MAX_SEGMENTS + 3):
        items = joined(items, gallery(1, first=1000 + number))
        most = max(most, len(update(folder, items, probes, **ROOMY).manifest["segments"]))
    assert most == updating.MAX_SEGMENTS
    assert len(Index(folder).segments) < 6
    assert found_ids(Index(folder), probes, 5) == exact_ids(items, probes, 5)


def test_a_refused_first_build_leaves_no_segment_behind(tmp_path, probes, monkeypatch):
    monkeypatch.setitem(types.EFFORTS, "ivf", (1,))
    with pytest.raises(IndexingError, match="under 0.99"):
        update(tmp_path / "i", gallery(3000), probes, kind="ivf", min_recall=0.99, **ROOMY)
    assert list((tmp_path / "i").glob("*")) == []


class Counted(list):
    """Thumbnails that know how many of them were read."""

    read = 0

    def __getitem__(self, row):
        self.read += 1
        return super().__getitem__(row)


def test_thumbnails_are_read_when_they_are_asked_for():
    small = Counted(gallery(200).thumbnails)
    items = gallery(200, thumbnails=small)
    part = items.take(np.array([5, 2, 9]))
    assert small.read == 0
    assert part.thumbnail(1) == b"jpeg p2"
    assert small.read == 1
    assert list(part.thumbnails) == [b"jpeg p5", b"jpeg p2", b"jpeg p9"]
    assert items.take(np.arange(3)).take(np.array([1])).thumbnails[0] == b"jpeg p1"


def test_compacting_streams_thumbnails(tmp_path, probes, monkeypatch):
    folder, items = tmp_path / "i", gallery(60)
    update(folder, items, probes, **ROOMY)
    remove(folder, ["p0"], probes)
    read, real = [], rows_module.SegmentRows.thumbnail
    monkeypatch.setattr(rows_module.SegmentRows, "thumbnail", lambda self, row: read.append(row) or real(self, row))
    before, write = [], rows_module.write_column

    def column(file, name, values):
        before.append((name, len(read)))
        write(file, name, values)

    monkeypatch.setattr(rows_module, "write_column", column)
    compact(folder, probes)
    assert ("thumbnail", 0) in before  # nothing was read until it was written
    monkeypatch.undo()
    index = Index(folder)
    assert [index.item(row) for row in range(59)] == [items.item(row) for row in range(1, 60)]


def test_segments_with_and_without_thumbnails_are_compacted_together(tmp_path, probes):
    folder, items = tmp_path / "i", gallery(60)
    update(folder, items, probes, **ROOMY)
    bare = gallery(9, first=60, thumbnails=[b""] * 9)
    update(folder, joined(items, bare), probes, **ROOMY)
    remove(folder, ["p0"], probes)
    compact(folder, probes)
    index = Index(folder)
    row = {name: number for number, name in enumerate(index.ids())}
    assert index.thumbnail(row["p7"]) == b"jpeg p7"
    assert index.thumbnail(row["p64"]) is None


def test_exact_search_agrees_with_the_matrix_product_and_k_may_exceed_the_gallery():
    generator = np.random.default_rng(0)
    items, queries = unit(generator, 30), unit(generator, 4)
    scores, rows = exact_search(items, queries, 7)
    np.testing.assert_array_equal(rows, np.argsort(-(queries @ items.T), axis=1)[:, :7])
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ items.T, rows, 1), rtol=1e-5)
    scores, rows = exact_search(items, queries, 500)
    assert rows.shape == (4, 30)
    assert rows.min() == 0  # no -1 that would be the last item


def fill(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"mine: {name}")


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


STRANGERS = ("2024-01.jpg", "000001.jpg", "000001.h5", "manifest-backup.json", "manifest-0123456789ab.json", "7.txt")


@pytest.mark.parametrize("pointer", [None, "text", "{}", "[]", '{"format": "another"}'])
def test_trap_a_folder_of_other_peoples_files_is_refused_and_left_as_it_is(tmp_path, probes, pointer):
    folder = tmp_path / "holiday"
    fill(folder, *STRANGERS)
    if pointer is not None:
        (folder / CURRENT).write_text(pointer)
    before = content(folder)
    for force in (False, True):
        with pytest.raises(IndexingError) as error:
            update(folder, gallery(20), probes, force=force, **ROOMY)
        assert str(error.value) == f"{folder} is not empty and no index; name another folder for the index"
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["holiday"]
    with pytest.raises(IndexingError, match="is no folder; name another folder"):
        update(folder / "7.txt", gallery(20), probes, **ROOMY)


def test_trap_other_peoples_files_beside_an_index_outlive_every_change(tmp_path, probes):
    folder, items = tmp_path / "i", gallery(60)
    update(folder, items, probes, **ROOMY)
    strangers = ("2024-01.jpg", "000002.jpg", "000003.h5", "000004.faiss", "000005-0123456789ab.npy", "manifest-a.json")
    fill(folder, *strangers, "manifest-0123456789ab.json")
    (folder / "2021.d").mkdir()
    before = {name: data for name, data in content(folder).items() if data.startswith(b"mine")}
    assert len(before) == 7
    items = joined(items, gallery(5, first=60))
    manifest = update(folder, items, probes, **ROOMY).manifest
    assert [entry["name"] for entry in manifest["segments"]] == ["000001", "000006"]  # numbers in use are left out
    remove(folder, ["p3", "p61"], probes)
    compact(folder, probes)
    update(folder, gallery(30, seed=3), probes, **ROOMY)
    assert {name: data for name, data in content(folder).items() if data.startswith(b"mine")} == before
    assert (folder / "2021.d").is_dir()


def test_a_failure_removes_what_was_written_and_not_what_came_meanwhile(tmp_path, probes, monkeypatch):
    folder = tmp_path / "i"
    update(folder, gallery(50), probes, **ROOMY)
    before = content(folder)

    def fails(*_):
        fill(folder, "000077.h5")
        (folder / "2021.d").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(updating, "measure", fails)
    with pytest.raises(OSError, match="No space left"):
        update(folder, gallery(60), probes, **ROOMY)
    assert content(folder) == before | {"000077.h5": b"mine: 000077.h5"}


def test_a_first_build_that_was_killed_is_taken_up_again_and_leaves_nothing(tmp_path, probes):
    with dying_at([3], tmp_path / "i") as exits:
        assert next(exits) == 9
    assert {"pending.json", "000001.h5", "000001.faiss"} <= set(content(tmp_path / "i"))
    made = update(tmp_path / "i", grown(), probes, **ROOMY).manifest
    assert len(content(tmp_path / "i")) == 4
    assert found_ids(Index(tmp_path / "i"), probes, 5) == exact_ids(grown(), probes, 5)
    assert made["segments"][0]["name"] == "000002"


def test_the_folder_of_an_index_is_claimed_once_and_a_strangers_is_refused(tmp_path, probes):
    names = ("images", "captions")
    fill(tmp_path / "holiday", "letter.txt")
    with pytest.raises(
        OutputError, match="holiday is not empty, and was not made by this program; name another folder"
    ):
        claim_index(tmp_path / "holiday", names)
    fill(tmp_path / "trip/captions", "0.txt")
    with pytest.raises(IndexingError, match="captions is not empty and no index; name another folder"):
        claim_index(tmp_path / "trip", names)
    claim_index(tmp_path / "new", names)
    fill(tmp_path / "new", "images.h5")
    claim_index(tmp_path / "new", names)
    update(tmp_path / "old/images", gallery(20), probes, **ROOMY)  # as earlier versions left it
    claim_index(tmp_path / "old", names)
    assert not (tmp_path / "old/.onceover.json").exists()


def signed(folder, change=None, files=None):
    """An index whose manifest, or files, somebody changed and signed again."""
    current = json.loads((folder / CURRENT).read_text())
    manifest = json.loads((folder / current["manifest"]).read_text())
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
        manifest["segments"][0]["files"][name] = hashlib.sha256(data).hexdigest()
    if change:
        change(manifest)
    data = json.dumps(manifest).encode()
    (folder / current["manifest"]).write_bytes(data)
    (folder / CURRENT).write_text(json.dumps(current | {"sha256": hashlib.sha256(data).hexdigest()}))
    return folder


@pytest.mark.parametrize("key", [*manifests.MANIFEST_FIELDS, *manifests.SEGMENT_FIELDS])
@pytest.mark.parametrize("value", ["missing", None, -1, [], {}, True, 1e400, "x"], ids=repr)
def test_trap_a_manifest_signed_again_by_hand_ends_in_one_line(tmp_path_factory, probes, key, value, built):
    folder = shutil.copytree(built, tmp_path_factory.mktemp("signed") / "i")

    def change(manifest):
        for part in (manifest, manifest["segments"][0]):
            if key in part and value == "missing":
                del part[key]
            elif key in part:
                part[key] = value

    signed(folder, change)
    try:
        Index(folder).search(probes, 3)
    except IndexingError as error:
        assert "\n" not in str(error)
    else:
        strings = {"space", "reason", "source", "run"}
        assert (
            (key in strings and value == "x")
            or (key, value) in {("removed", None), ("biased", True)}
            or (key in {"min_recall", "recall@10", "queries_per_second"} and value == -1)
        )


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "i"
    update(folder, gallery(40), unit(np.random.default_rng(5), 60), **ROOMY)
    return folder


def faiss_bytes(recipe, rows=40, dim=24):
    index = faiss_files.faiss.index_factory(dim, recipe, faiss_files.faiss.METRIC_INNER_PRODUCT)
    index.train(gallery(rows).vectors)
    if recipe.startswith("IDMap"):
        index.add_with_ids(gallery(rows).vectors, np.arange(rows) + 10**6)
    else:
        index.add(gallery(rows).vectors)
    return faiss_files.faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize("recipe", ["IDMap,Flat", "HNSW8", "IVF4,Flat", "SQ8", "PCA12,Flat"])
@pytest.mark.parametrize("kind", TYPES)
def test_trap_an_index_of_another_kind_is_refused_before_it_is_searched(tmp_path, built, recipe, kind):
    if (recipe, kind) in {("HNSW8", "hnsw"), ("IVF4,Flat", "ivf")}:
        pytest.skip("the same kind")
    folder = shutil.copytree(built, tmp_path / "i")
    signed(folder, lambda made: made["segments"][0].update(type=kind), {"000001.faiss": faiss_bytes(recipe)})
    with pytest.raises(IndexingError, match="is not the index that its manifest describes"):
        Index(folder)


def test_damaged_bytes_that_were_signed_again_end_in_one_line(tmp_path, built):
    for name in ("000001.faiss", "000001.h5"):
        whole = (built / name).read_bytes()
        for seed in range(12):
            folder = shutil.copytree(built, tmp_path / f"{name} {seed}")
            generator = np.random.default_rng(seed)
            with pytest.raises(IndexingError):
                Index(signed(folder, files={name: whole[: int(generator.integers(len(whole)))]}))


@pytest.mark.parametrize(
    "rows",
    [
        np.array([40]), np.array([-1]), np.array([1], np.int32), np.array([[1]]), np.array([1.0]), np.array(1),
        np.array([2**62]), "text", b"",
    ],
    ids=str,
)  # fmt: skip
def test_trap_tombstones_that_point_elsewhere_are_refused(tmp_path, built, rows):
    import io

    folder, data = shutil.copytree(built, tmp_path / "i"), io.BytesIO()
    if isinstance(rows, np.ndarray):
        np.save(data, rows)
    else:
        data.write(b"\x93NUMPY\x01\x00v\x00{'descr': (((" if rows else b"")
    name = "000001-0123456789ab.npy"
    signed(folder, lambda made: made["segments"][0].update(removed=name), {name: data.getvalue()})
    with pytest.raises(IndexingError, match="holds no list of removed rows; build it again"):
        Index(folder)


def test_what_faiss_raises_is_one_line(tmp_path, built, probes):
    index = Index(built)

    def broken(*_, **__):
        raise RuntimeError("Error in faiss\nat line 3")

    index.segments[0]._index = type("Broken", (), {"search": broken, "reconstruct_n": broken})()
    with pytest.raises(IndexingError, match="cannot be used by faiss: it is damaged; build it again"):
        index.search(probes, 3)
    with pytest.raises(IndexingError, match="cannot be used by faiss"):
        list(index.segments[0].vectors())


@pytest.mark.parametrize("part", [".h5", ".faiss", ".npy", "manifest", CURRENT])
def test_a_disk_that_fills_up_leaves_the_last_version_and_nothing_else(tmp_path, probes, monkeypatch, part):
    folder = tmp_path / "i"
    update(folder, gallery(50), probes, **ROOMY)
    before = content(folder)
    real = os.replace

    def full(source, target):
        if part in Path(target).name:
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr("os.replace", full)
    items = joined(gallery(50).take(np.arange(1, 50)), gallery(5, first=50))
    with pytest.raises(OSError, match="No space left on device"):
        update(folder, items, probes, **ROOMY)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (range(26), "26 of 50 indexed images are no longer in there; is a disk not mounted?"),
        ((47, 48, 49), "3 of 50 indexed images are no longer in there (no image of disk/ is there); is a disk"),
        ((49,), "1 of 50 indexed images are no longer in there (no image of disk/b/ is there); is a disk"),
        (range(25), None),
        ((47,), None),
        ((), None),
    ],
    ids=["most", "disk", "folder", "half", "one", "none"],
)
def test_so_many_vanished_images_are_taken_for_a_disk_that_is_not_mounted(tmp_path, probes, gone, message):
    names = [f"p{number}" for number in range(47)] + ["disk/a/1", "disk/a/2", "disk/b/1"]
    update(tmp_path / "i", gallery(50, ids=names), probes, **ROOMY | {"source": "there"})
    now = [name for number, name in enumerate(names) if number not in gone]
    if message is None:
        check_vanished(tmp_path / "i", now, ["there"])
    else:
        with pytest.raises(IndexingError) as error:
            check_vanished(tmp_path / "i", now, ["there"])
        assert str(error.value).startswith(message)
        assert str(error.value).endswith("--prune drops them, --force goes on without them and keeps their features")
    check_vanished(tmp_path / "none", [], ["there"])


def test_images_that_are_excluded_are_not_taken_for_vanished(tmp_path, probes):
    names = [f"p{number}" for number in range(20)] + [f"raw/{number}" for number in range(30)]
    update(tmp_path / "i", gallery(50, ids=names), probes, **ROOMY | {"source": "there"})
    check_vanished(tmp_path / "i", names[:20], ["there"], ["raw"])
    check_vanished(tmp_path / "i", names[:10], ["there"], ["raw/**"])
    with pytest.raises(IndexingError, match=r"^11 of 20 indexed images are no longer in there; is a disk"):
        check_vanished(tmp_path / "i", names[:9], ["there"], ["raw"])
    with pytest.raises(IndexingError, match=r"^30 of 50 indexed images .* \(no image of raw/ is there\)"):
        check_vanished(tmp_path / "i", names[:20], ["there"], ["*.gif"])


def test_compacting_without_the_last_version_leaves_nothing_of_what_was_removed(tmp_path, probes):
    folder = tmp_path / "i"
    update(folder, gallery(60), probes, **ROOMY)
    remove(folder, ["p33"], probes)
    compact(folder, probes, keep_last=False)
    assert len(content(folder)) == 4
    assert not any(b"p33" in data for data in content(folder).values())
    remove(folder, ["p34"], probes)
    compact(folder, probes)
    assert any(b"p34" in data for data in content(folder).values())  # of the last version
    assert compact(folder, probes, keep_last=False).up_to_date
    assert not any(b"p34" in data for data in content(folder).values())
