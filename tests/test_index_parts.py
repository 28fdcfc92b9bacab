"""Indexes built of parts that processes share, and several indexes searched as one."""

import errno
import hashlib
import json
import os
from pathlib import Path

import faiss
import numpy as np
import pytest

from onceover.base.formats import CURRENT
from onceover.base.worker import Worker, WorkerError
from onceover.retrieval.gallery import Gallery
from onceover.retrieval.index import Index, IndexingError, faiss_files, lists, read_manifest, update, update_share

ASKED = {"memory": 2**40, "run": "runs/first", "source": "here"}
ROWS = 5000  # three parts, when parts are as small as they can be


def gallery(rows=ROWS, seed=0, folder="/one", **changes):
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((rows, 16)).astype(np.float32)
    names = [f"{number}.jpg" for number in range(rows)]
    columns = {
        "kind": "image",
        "vectors": vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        "biased": False,
        "ids": names,
        "paths": [f"{folder}/{name}" for name in names],
        "captions": [[] for _ in names],
        "contents": [f"{seed} {name}" for name in names],
        "thumbnails": None,
        "space": "s",
    }
    return Gallery(**columns | changes)


@pytest.fixture
def probes():
    return gallery(60, seed=9).vectors


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(lists, "_PART_BYTES", 1)


def faiss_file(folder):
    return (folder / f"{read_manifest(folder)['segments'][0]['name']}.faiss").read_bytes()


@pytest.mark.parametrize("kind", lists.SHARED_TYPES)
def test_a_file_merged_from_parts_is_the_one_that_faiss_writes(tmp_path, small_parts, kind):
    vectors = gallery().vectors
    parts = lists.ListParts(tmp_path / "i", vectors, "of these", kind)
    lists.write_lists(parts, tmp_path / "i.faiss")
    index = faiss.deserialize_index(np.frombuffer(faiss_files.train_lists(vectors, kind), np.uint8))
    index.add(vectors)
    assert (tmp_path / "i.faiss").read_bytes() == faiss.serialize_index(index).tobytes()
    assert not parts.folder.exists()


def test_half_precision_lists_take_half_the_bytes_and_find_the_same(tmp_path, probes):
    for kind in lists.SHARED_TYPES:
        update(tmp_path / kind, gallery(), probes, kind=kind, **ASKED)
    assert len(faiss_file(tmp_path / "ivf")) - len(faiss_file(tmp_path / "ivf16")) > 0.9 * ROWS * 16 * 2
    vectors = [np.concatenate(list(Index(tmp_path / kind).segments[0].vectors())) for kind in lists.SHARED_TYPES]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=3e-4)
    np.testing.assert_array_equal(vectors[1].astype(np.float16), vectors[1])


def test_workers_in_any_order_make_the_index_of_one_process(tmp_path, probes, small_parts):
    update(tmp_path / "alone", gallery(), probes, kind="ivf16", **ASKED)
    for number in (3, 1, 2, 1):
        update_share(tmp_path / "shared", gallery(), Worker(number, 3), kind="ivf16", **ASKED)
        assert not (tmp_path / "shared").exists()
    assert len(list((tmp_path / "shared.parts").glob("part-*.h5"))) == 3
    written = {path.name: path.stat().st_ino for path in (tmp_path / "shared.parts").iterdir()}
    assert sorted(written) == ["part-000000.h5", "part-000001.h5", "part-000002.h5", "plan.json", "trained.faiss"]
    made = update(tmp_path / "shared", gallery(), probes, kind="ivf16", **ASKED)
    assert made.added == ROWS
    assert faiss_file(tmp_path / "shared") == faiss_file(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["alone", "shared"]


def test_the_last_call_encodes_what_a_lost_worker_left_and_nothing_twice(tmp_path, probes, small_parts, monkeypatch):
    update_share(tmp_path / "i", gallery(), Worker(1, 3), kind="ivf", **ASKED)
    encoded = []
    encode = lists.cell_codes

    def noting(index, vectors):
        encoded.append(len(vectors))
        return encode(index, vectors)

    monkeypatch.setattr(lists, "cell_codes", noting)
    update(tmp_path / "i", gallery(), probes, kind="ivf", **ASKED)
    assert encoded == [2048, ROWS - 2 * 2048]


def test_a_build_that_was_killed_goes_on_with_the_parts_that_are_there(tmp_path, probes, small_parts, monkeypatch):
    write_once = lists.write_once

    def killed(path, data):
        if path.name == "part-000001.h5":
            raise KeyboardInterrupt
        write_once(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(lists, "write_once", killed)
        with pytest.raises(KeyboardInterrupt):
            update(tmp_path / "i", gallery(), probes, kind="ivf16", **ASKED)
    (part,) = (tmp_path / "i.parts").glob("part-*.h5")
    before = part.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(lists.ListParts, "remove", lambda parts: None)
        update(tmp_path / "i", gallery(), probes, kind="ivf16", **ASKED)
    assert part.stat().st_mtime_ns == before


def test_a_build_of_something_else_that_was_killed_is_discarded(tmp_path, probes, small_parts):
    other = gallery(seed=1)
    parts = lists.ListParts(tmp_path / "i", other.vectors, "another", "ivf")
    parts.begin()
    parts.write([0])
    update(tmp_path / "i", gallery(), probes, kind="ivf16", **ASKED)
    assert not parts.folder.exists()


def test_a_damaged_part_is_encoded_again_with_a_warning(tmp_path, probes, small_parts, caplog):
    update_share(tmp_path / "i", gallery(), Worker(1, 1), kind="ivf", **ASKED)
    part = tmp_path / "i.parts" / "part-000001.h5"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    update(tmp_path / "i", gallery(), probes, kind="ivf", **ASKED)
    assert "encoding a damaged part again" in caplog.text
    update(tmp_path / "alone", gallery(), probes, kind="ivf", **ASKED)
    assert faiss_file(tmp_path / "i") == faiss_file(tmp_path / "alone")


@pytest.mark.parametrize(
    ("other", "worker", "message"),
    [
        ({"seed": 0}, Worker(1, 4), "is shared by 3 workers"),
        ({"seed": 1}, Worker(2, 3), r"holds parts of something else \(vectors_sha256 differ\)"),
    ],
)
def test_workers_with_another_command_are_refused_and_change_nothing(tmp_path, small_parts, other, worker, message):
    update_share(tmp_path / "i", gallery(), Worker(1, 3), kind="ivf", **ASKED)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "i.parts").iterdir())
    with pytest.raises(WorkerError, match=message):
        update_share(tmp_path / "i", gallery(**other), worker, kind="ivf", **ASKED)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "i.parts").iterdir()) == before


def test_trap_a_strangers_folder_where_the_parts_would_lie_is_refused_and_left(tmp_path, probes):
    (tmp_path / "i.parts").mkdir()
    (tmp_path / "i.parts" / "novel.txt").write_text("mine")
    with pytest.raises(IndexingError, match="it holds other files; move it elsewhere"):
        update(tmp_path / "i", gallery(), probes, kind="ivf", **ASKED)
    assert (tmp_path / "i.parts" / "novel.txt").read_text() == "mine"


def test_an_index_that_cannot_be_shared_says_who_builds_it(tmp_path, told):
    update_share(tmp_path / "i", gallery(), Worker(1, 2), kind="hnsw", **ASKED)
    message = "a hnsw index of 5,000 rows is not shared; the call without --worker builds it"
    assert f"{tmp_path / 'i'}: {message}" in told
    assert not (tmp_path / "i.parts").exists()


def test_trap_lists_in_a_file_elsewhere_are_refused(tmp_path, probes):
    folder = tmp_path / "i"
    update(folder, gallery(), probes, kind="ivf", **ASKED)
    index = faiss.deserialize_index(np.frombuffer(faiss_file(folder), np.uint8))
    elsewhere = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(tmp_path / "elsewhere.ivfdata"))
    elsewhere.merge_from_1(index.invlists)
    index.replace_invlists(elsewhere)
    data = faiss.serialize_index(index).tobytes()
    assert b"elsewhere.ivfdata" in data
    current = json.loads((folder / CURRENT).read_text())
    manifest = json.loads((folder / current["manifest"]).read_text())
    manifest["segments"][0]["files"]["000001.faiss"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(manifest).encode()
    (folder / "000001.faiss").write_bytes(data)
    (folder / current["manifest"]).write_bytes(text)
    (folder / CURRENT).write_text(json.dumps(current | {"sha256": hashlib.sha256(text).hexdigest()}))
    with pytest.raises(IndexingError, match="is not the index that its manifest describes"):
        Index(folder)


@pytest.mark.parametrize("kind", ["flat", "ivf16"])
def test_several_indexes_are_searched_as_one_and_know_images_by_their_paths(tmp_path, probes, kind):
    galleries = [gallery(600, seed=1, folder="/one"), gallery(500, seed=2, folder="/two")]
    for number, items in enumerate(galleries):
        update(tmp_path / str(number), items, probes, kind=kind, min_recall=0.999, **ASKED)
    index = Index(tmp_path / "0", tmp_path / "1")
    assert len(index) == 1100
    scores = probes @ np.concatenate([items.vectors for items in galleries]).T
    paths = galleries[0].paths + galleries[1].paths
    for (found_scores, rows), of_query in zip(index.search(probes, 10), scores, strict=True):
        np.testing.assert_allclose(found_scores, np.sort(of_query)[::-1][:10], atol=3e-4)
        expected = [paths[row] for row in np.argsort(-of_query)[:10]]
        assert len({item["id"] for item in index.items(rows.tolist())} & set(expected)) >= 9
    assert index.ids() == paths
    row = index.row_of("/two/7.jpg")
    np.testing.assert_allclose(index.vector(row), galleries[1].vectors[7], atol=3e-4)
    assert index.item(row) == {"id": "/two/7.jpg", "path": "/two/7.jpg", "captions": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "t"}, "were made by different heads or encoders; index both with the same run"),
        ({"biased": True}, "only one of .* is corrected for hubs; index both with the same --rerank"),
        ({"kind": "text"}, "hold images and captions; name indexes of one kind"),
    ],
)
def test_indexes_whose_scores_cannot_be_compared_are_refused(tmp_path, probes, changes, message):
    update(tmp_path / "0", gallery(50), probes, **ASKED)
    update(tmp_path / "1", gallery(50, **changes), probes, **ASKED)
    with pytest.raises(IndexingError, match=message):
        Index(tmp_path / "0", tmp_path / "1")


def test_an_index_that_is_named_twice_is_refused(tmp_path, probes):
    update(tmp_path / "0", gallery(50), probes, **ASKED)
    with pytest.raises(IndexingError, match="the same index is named twice"):
        Index(tmp_path / "0", Path(tmp_path / ".." / tmp_path.name / "0"))


def test_trap_a_worker_that_is_busy_while_parts_are_merged_blocks_nothing(tmp_path, probes, small_parts, monkeypatch):
    update_share(tmp_path / "i", gallery(), Worker(1, 3), kind="ivf16", **ASKED)
    late = tmp_path / "i.parts/part-000000.h5"
    content = late.read_bytes()
    real = lists.remove_files
    moments = []

    def slow(folder, names, **options):
        if not moments:
            moments.append(folder)
            (folder / "busy").touch()  # so that the folder cannot go
            real(folder, names, **options)
            (folder / "busy").unlink()
            late.write_bytes(content)
            return
        real(folder, names, **options)

    monkeypatch.setattr(lists, "remove_files", slow)
    update(tmp_path / "i", gallery(), probes, kind="ivf16", **ASKED)
    assert moments == [late.parent]
    assert not late.parent.exists()
    monkeypatch.undo()
    late.parent.mkdir()
    late.write_bytes(content)
    update(tmp_path / "i", gallery(seed=1), probes, kind="ivf16", **ASKED)
    assert not late.parent.exists()


def test_parts_that_workers_left_of_other_vectors_give_way(tmp_path, probes, small_parts, told):
    update_share(tmp_path / "i", gallery(), Worker(1, 3), kind="ivf16", **ASKED)
    update(tmp_path / "i", gallery(seed=1), probes, kind="ivf16", **ASKED)
    assert f"{tmp_path / 'i.parts'}: removing parts of an index that was not finished" in told
    assert not (tmp_path / "i.parts").exists()


def test_trap_a_part_that_cannot_be_read_for_a_moment_stays(tmp_path, probes, small_parts, monkeypatch):
    update_share(tmp_path / "i", gallery(), Worker(1, 3), kind="ivf16", **ASKED)
    part = tmp_path / "i.parts/part-000000.h5"
    before = part.stat()

    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        patch.setattr(lists, "open_hdf5", stale)
        update_share(tmp_path / "i", gallery(), Worker(1, 3), kind="ivf16", **ASKED)
    assert (part.stat().st_ino, part.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_trap_a_part_of_other_vectors_is_never_merged(tmp_path, probes, small_parts, monkeypatch):
    """A worker of the vectors before comes late, when the parts of the present ones are being written."""
    update_share(tmp_path / "i", gallery(), Worker(1, 3), kind="ivf16", **ASKED)
    late = tmp_path / "i.parts/part-000000.h5"
    content = late.read_bytes()
    real = lists.write_once

    def write_once(path, data):
        real(path, content if path == late else data)

    with monkeypatch.context() as patch, pytest.raises(IndexingError, match=f"{late} is a part of another index"):
        patch.setattr(lists, "write_once", write_once)
        update(tmp_path / "i", gallery(seed=1), probes, kind="ivf16", **ASKED)
    update(tmp_path / "i", gallery(seed=1), probes, kind="ivf16", **ASKED)
    update(tmp_path / "alone", gallery(seed=1), probes, kind="ivf16", **ASKED)
    assert faiss_file(tmp_path / "i") == faiss_file(tmp_path / "alone")
