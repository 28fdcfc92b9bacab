"""Tables of new images and captions: as a run encodes them, resumed, with failures told and nothing of others lost."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from onceover import workflows
from onceover.base.errors import OnceoverError
from onceover.extract.store import FeatureStore
from onceover.heads.checkpoint import load_run
from onceover.heads.query import QueryEmbedder
from onceover.retrieval.embeddings import read_embeddings


@pytest.fixture
def folder(tmp_path, drawn):
    """Twenty of the run's own images and one that is none."""
    images = tmp_path / "new"
    images.mkdir()
    for number in range(20):
        shutil.copy(drawn / f"images/{number:04d}.jpg", images / f"{number}.jpg")
    (images / "broken.jpg").write_bytes(b"no image")
    return images


def vectors_of(table):
    column = table.column("embedding").combine_chunks()
    return np.asarray(column.values).reshape(len(table), -1)


def rows_of(embeddings, ids):
    return [embeddings.ids.index(f"images/{int(name.removesuffix('.jpg')):04d}.jpg") for name in ids]


def test_images_of_the_run_get_the_vectors_and_places_that_they_have_in_it(run_dir, folder, tmp_path, told):
    file = workflows.embed(run_dir, tmp_path / "new.parquet", images=folder, with_images=True, neighbours=2)
    table = pq.read_table(file)
    expected = ["id", "path", "embedding", "image", "x", "y", "neighbours", "neighbour_ids", "neighbour_scores"]
    assert table.column_names == expected
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    ids = table.column("id").to_pylist()
    assert sorted(ids) == sorted(f"{number}.jpg" for number in range(20))
    rows = rows_of(embeddings, ids)
    np.testing.assert_allclose(vectors_of(table), embeddings.images[rows], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors_of(table), axis=1), 1, atol=1e-6)
    exported = pq.read_table(workflows.export(run_dir, tmp_path / "own.parquet"))
    for axis in ("x", "y"):
        own = exported.column(axis).to_numpy()[rows]
        np.testing.assert_allclose(table.column(axis).to_numpy(), own, atol=1e-5)
    image = table.column("image")[0].as_py()
    assert image["bytes"] == (folder / ids[0]).read_bytes()
    assert image["path"] == table.column("path")[0].as_py() == str(folder / ids[0])
    about = json.loads(table.schema.metadata[b"onceover"])
    assert about["space"] == embeddings.space
    assert about["map"] == "PCA of all images of the run"
    with FeatureStore(tmp_path / "new.parquet.features.h5") as store:
        assert [failure.id for failure in store.failures] == ["broken.jpg"]
    assert any("left out: 1 at stage image" in line for line in told)


def test_captions_get_the_vectors_of_queries(run, run_dir, tmp_path):
    texts = ["A red circle above a blue star .", "A green ring"]
    captions = tmp_path / "captions.txt"
    captions.write_text(f"{texts[0]}\n\n{texts[1]}\n")
    shown = run("embed", "--run", run_dir, "--captions", captions, "--to", tmp_path / "texts.parquet")
    table = pq.read_table(tmp_path / "texts.parquet")
    assert table.column_names[:5] == ["id", "caption", "embedding", "x", "y"]
    assert table.column("caption").to_pylist() == texts
    queries = QueryEmbedder(load_run(run_dir)).embed_texts(texts)
    np.testing.assert_allclose(vectors_of(table), queries, atol=1e-5)
    assert table.column("neighbours").to_pylist()[0]["ids"] == [1]
    assert "left out: 1 at stage dataset: empty caption (the first: line 2)" in shown.stderr
    assert f"embedding-atlas: embedding-atlas {tmp_path / 'texts.parquet'} --text caption" in shown.stderr


def test_an_interrupted_call_goes_on_and_a_later_one_encodes_what_is_new(
    run_dir, folder, tmp_path, monkeypatch, interrupt_after, told
):
    file = tmp_path / "new.parquet"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            workflows.embed(run_dir, file, images=folder)
    assert not file.exists()
    assert list((tmp_path / "new.parquet.features.h5.parts").glob("image*.h5"))
    workflows.embed(run_dir, file, images=folder)
    assert any("are there already" in line for line in told)
    assert len(pq.read_table(file)) == 20
    before = file.read_bytes()
    workflows.embed(run_dir, file, images=folder)
    assert file.read_bytes() == before
    (folder / "0.jpg").unlink()
    shutil.copy(folder / "1.jpg", folder / "copy.jpg")
    told.clear()
    workflows.embed(run_dir, file, images=folder)
    table = pq.read_table(file)
    assert {"copy.jpg"} == {*table.column("id").to_pylist()} - {f"{number}.jpg" for number in range(1, 20)}
    assert "0.jpg" not in table.column("id").to_pylist()


def test_features_that_are_not_the_table_s_own_stay(fails, run_dir, folder, tmp_path, store_file):
    features = shutil.copy(store_file, tmp_path / "new.parquet.features.h5")
    before = features.read_bytes()
    message = fails("embed", "--run", run_dir, "--images", folder, "--to", tmp_path / "new.parquet")
    assert message == f"{features} is another feature store, and features are to be kept there; move it elsewhere"
    assert features.read_bytes() == before
    assert not (tmp_path / "new.parquet").exists()


def test_a_file_of_somebody_else_s_is_refused_before_anything_is_encoded(fails, run_dir, folder, tmp_path):
    file = tmp_path / "mine.parquet"
    file.write_text("mine")
    assert "was not written by this program" in fails("embed", "--run", run_dir, "--images", folder, "--to", file)
    assert file.read_text() == "mine"
    assert not (tmp_path / "mine.parquet.features.h5").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either --images or --captions"),
        (["--images", "a", "--captions", "b"], "name either --images or --captions"),
        (["--captions", "b", "--with-images"], "--with-images and --exclude go with --images"),
        (["--captions", "b", "--exclude", "*.gif"], "--with-images and --exclude go with --images"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, run_dir, tmp_path, arguments, message):
    shown = run("embed", "--run", run_dir, "--to", tmp_path / "x.parquet", *arguments, code=2)
    assert shown.stderr.splitlines()[-1] == f"Error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "nowhere"}, "nowhere is no folder; name one that holds images"),
        ({"captions": "empty.txt"}, "empty.txt holds no captions; write one per line"),
        ({}, "name a folder of images or a file of captions, one of the two"),
        ({"captions": "empty.txt", "with_images": True}, "a row that is a caption holds no image"),
    ],
)
def test_input_that_holds_nothing_is_one_line(run_dir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(OnceoverError, match=message):
        workflows.embed(run_dir, "x.parquet", **arguments)
    assert not (tmp_path / "x.parquet").exists()
