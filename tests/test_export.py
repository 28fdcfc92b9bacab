"""Tables of a run's images and captions: equal to its embeddings, whole, and opened by other programs."""

import hashlib
import io
import json
import shlex
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from onceover import workflows
from onceover.analysis.coordinates import PrincipalMap, map_coordinates
from onceover.analysis.export import ExportError
from onceover.base.errors import OnceoverError
from onceover.extract.store import caption_ids
from onceover.retrieval import vector_table
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.open_elsewhere import ways_to_open
from onceover.retrieval.vector_table import nearest_others


@pytest.fixture(scope="module")
def embeddings(run_dir):
    return read_embeddings(run_dir / "embeddings.h5")


@pytest.fixture(scope="module")
def images_file(tmp_path_factory, run_dir):
    """All images of the run, with their bytes, exported to a file in a folder of its own."""
    return workflows.export(run_dir, tmp_path_factory.mktemp("export") / "images.parquet", with_images=True)


@pytest.fixture(scope="module")
def captions_file(tmp_path_factory, run_dir):
    return workflows.export(run_dir, tmp_path_factory.mktemp("export") / "captions.parquet", kind="text", neighbours=3)


def vectors_of(table):
    column = table.column("embedding").combine_chunks()
    return np.asarray(column.values).reshape(len(table), -1)


def test_a_table_of_images_holds_their_embeddings_bit_for_bit_and_all_that_is_known_of_them(images_file, embeddings):
    table = pq.read_table(images_file)
    assert table.column_names == [
        *("id", "path", "split", "caption", "captions", "embedding", "image", "x", "y"),
        *("neighbours", "neighbour_ids", "neighbour_scores"),
    ]
    assert vectors_of(table).tobytes() == np.asarray(embeddings.images).tobytes()
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == embeddings.ids
    assert [row["path"] for row in rows] == embeddings.paths
    assert [row["split"] for row in rows] == embeddings.splits
    for number, row in enumerate(rows):
        own = np.flatnonzero(embeddings.image_index == number)
        assert row["captions"] == [embeddings.captions[caption] for caption in own]
        assert row["caption"] == row["captions"][0]
        assert row["image"]["path"] == embeddings.paths[number]
        assert hashlib.sha256(row["image"]["bytes"]).hexdigest() == embeddings.sha256[number]


def test_a_table_of_captions_holds_their_embeddings_bit_for_bit_and_their_images(captions_file, embeddings):
    table = pq.read_table(captions_file)
    assert vectors_of(table).tobytes() == np.asarray(embeddings.texts).tobytes()
    assert table.column("caption").to_pylist() == embeddings.captions
    assert table.column("id").to_pylist() == caption_ids(embeddings.ids, embeddings.image_index)
    images = embeddings.image_index.tolist()
    assert table.column("image_id").to_pylist() == [embeddings.ids[image] for image in images]
    assert table.column("split").to_pylist() == [embeddings.splits[image] for image in images]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_table_of_a_split_holds_its_items_alone(run_dir, tmp_path, embeddings, kind):
    table = pq.read_table(workflows.export(run_dir, tmp_path / "dev.parquet", kind=kind, split="dev"))
    images, captions, _ = embeddings.split("dev")
    expected = embeddings.images[images] if kind == "image" else embeddings.texts[captions]
    assert vectors_of(table).tobytes() == expected.tobytes()
    assert set(table.column("split").to_pylist()) == {"dev"}
    rows = np.array([row["ids"] for row in table.column("neighbours").to_pylist()])
    ids = np.array(table.column("id").to_pylist())
    assert table.column("neighbour_ids").to_pylist() == ids[rows].tolist()


def test_the_schema_says_what_made_the_vectors(images_file, run_dir, embeddings):
    metadata = pq.read_schema(images_file).metadata
    about = json.loads(metadata[b"onceover"])
    run = json.loads((run_dir / "run.json").read_text())
    assert about["format"] == "onceover vectors"
    assert about["space"] == run["space"] == embeddings.space
    assert about["heads"] == run["files"]["heads.safetensors"]
    assert about["encoders"] == {kind: run["encoders"][kind]["encoder"] for kind in ("image", "text")}
    assert about["kind"] == "image"
    assert about["split"] is None
    assert about["map"] == "PCA of all images of the run"


@pytest.mark.parametrize("count", [1, 5, 59, 200])
def test_neighbours_are_those_of_a_slow_reference(embeddings, count):
    vectors = np.asarray(embeddings.images)
    scores, rows = nearest_others(vectors, slice(10, 25), count)
    kept = min(count, 59)
    assert rows.shape == scores.shape == (15, kept)
    for row, (own_scores, others) in enumerate(zip(scores, rows, strict=True), 10):
        expected = [(float(vectors[row] @ vectors[other]), other) for other in range(60) if other != row]
        expected.sort(reverse=True)
        np.testing.assert_allclose(own_scores, [score for score, _ in expected[:kept]], atol=1e-6)
        assert row not in others
        np.testing.assert_allclose(own_scores, vectors[others] @ vectors[row], atol=1e-6)


def test_neighbours_of_many_equal_vectors_are_others_all_the_same():
    vectors = np.tile(np.array([[0.6, 0.8]], np.float32), (30, 1))
    scores, rows = nearest_others(vectors, slice(0, 30), 4)
    assert not (rows == np.arange(30)[:, None]).any()
    assert rows.shape == (30, 4)
    np.testing.assert_allclose(scores, 1, atol=1e-6)


def test_the_only_item_has_no_neighbours():
    scores, rows = nearest_others(np.ones((1, 1), np.float32), slice(0, 1), 10)
    assert scores.shape == rows.shape == (1, 0)


def test_coordinates_are_the_principal_components_whatever_the_blocks(embeddings, monkeypatch):
    from sklearn.decomposition import PCA

    vectors = np.asarray(embeddings.images)
    whole = PrincipalMap(vectors).points(vectors)
    monkeypatch.setattr("onceover.analysis.coordinates._ROWS", 7)
    np.testing.assert_allclose(PrincipalMap(vectors).points(vectors), whole, atol=1e-5)
    reference = PCA(2, svd_solver="full").fit_transform(vectors.astype(np.float64))
    np.testing.assert_allclose(np.abs(whole), np.abs(reference), atol=1e-5)


def test_images_of_a_small_split_lie_where_the_run_s_t_sne_map_shows_them(run_dir, tmp_path, monkeypatch):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    kept = []

    def keep(run, pairs, compute):
        kept.append(map_coordinates(run, pairs, compute))
        return kept[-1]

    monkeypatch.setattr("onceover.analysis.export.map_coordinates", keep)
    table = pq.read_table(workflows.export(copy, tmp_path / "test.parquet", split="test"))
    points = np.column_stack([table.column("x"), table.column("y")])
    assert len(kept) == 1
    np.testing.assert_array_equal(points, kept[0][:12])
    assert json.loads(table.schema.metadata[b"onceover"])["map"] == "t-SNE"
    assert list(copy.glob("map-test*.npz"))


def test_the_same_run_gives_the_same_bytes_and_a_table_is_written_in_many_groups(
    run_dir, tmp_path, images_file, monkeypatch
):
    again = workflows.export(run_dir, tmp_path / "again.parquet", with_images=True)
    assert again.read_bytes() == images_file.read_bytes()
    monkeypatch.setattr(vector_table, "GROUP_ROWS", 7)
    workflows.export(run_dir, again, with_images=True)
    assert pq.ParquetFile(again).num_row_groups == 9
    assert pq.read_table(again) == pq.read_table(images_file)
    monkeypatch.setattr(vector_table, "GROUP_BYTES", 1)
    workflows.export(run_dir, again, with_images=True)
    assert pq.ParquetFile(again).num_row_groups == 60
    assert pq.read_table(again) == pq.read_table(images_file)


def test_datasets_reads_the_table_with_its_images(images_file, tmp_path, monkeypatch, embeddings, drawn):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    rows = datasets.Dataset.from_parquet(str(images_file), cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(np.array(rows.with_format("numpy")["embedding"]), embeddings.images)
    assert isinstance(rows.features["image"], datasets.Image)
    image = rows[3]["image"]
    with Image.open(drawn / embeddings.paths[3]) as original:
        assert np.array_equal(np.asarray(image), np.asarray(original))
    own = np.flatnonzero(embeddings.image_index == 3)
    assert rows[3]["captions"] == [embeddings.captions[row] for row in own]


def nearest_in(embeddings, row, count):
    """The rows with the largest cosine similarities to a row, itself among them."""
    return np.argsort(-(embeddings.images @ embeddings.images[row]), kind="stable")[:count].tolist()


def test_duckdb_finds_the_same_nearest_images(images_file, embeddings):
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed")
    dim = embeddings.images.shape[1]
    query = f"""
        SELECT b.id FROM read_parquet(?) a, read_parquet(?) b WHERE a.id = ?
        ORDER BY array_cosine_similarity(a.embedding::FLOAT[{dim}], b.embedding::FLOAT[{dim}]) DESC LIMIT 4
    """
    found = duckdb.sql(query, params=[str(images_file), str(images_file), embeddings.ids[3]]).fetchall()
    assert [name for (name,) in found] == [embeddings.ids[row] for row in nearest_in(embeddings, 3, 4)]
    named = duckdb.sql("SELECT neighbour_ids[1:3] FROM read_parquet(?) OFFSET 3 LIMIT 1", params=[str(images_file)])
    assert named.fetchall()[0][0] == [embeddings.ids[row] for row in nearest_in(embeddings, 3, 4)[1:]]


def test_lancedb_finds_the_same_nearest_images(images_file, embeddings, tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="LanceDB is not installed")
    table = lancedb.connect(tmp_path / "lance").create_table("images", pq.read_table(images_file))
    hits = table.search(embeddings.images[3]).distance_type("cosine").limit(4).to_list()
    assert [hit["id"] for hit in hits] == [embeddings.ids[row] for row in nearest_in(embeddings, 3, 4)]


def test_the_printed_calls_run(images_file, tmp_path, monkeypatch, capsys):
    for name in ("datasets", "duckdb", "lancedb"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    file = shutil.copy(images_file, tmp_path / "dogs' images.parquet")
    calls = ways_to_open(tmp_path / file.name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list(calls) == ["Hugging Face datasets", "DuckDB", "LanceDB", "embedding-atlas"]
    for program in list(calls)[:3]:
        python, option, statements = shlex.split(calls[program])
        assert (python, option) == ("python", "-c")
        exec(statements, {})
        assert "images/0000.jpg" in capsys.readouterr().out
    atlas = shlex.split(calls["embedding-atlas"])
    columns = dict(zip(atlas[2::2], atlas[3::2], strict=True))
    assert columns == {"--text": "caption", "--x": "x", "--y": "y", "--neighbors": "neighbours"}
    nearest = pq.read_table(file).column("neighbours")[0].as_py()  # as embedding-atlas takes them
    assert len(nearest["ids"]) == len(nearest["distances"]) == 10
    assert nearest["distances"] == sorted(nearest["distances"])


def test_the_command_writes_the_table_and_prints_how_to_open_it(run, run_dir, tmp_path):
    file = tmp_path / "few.parquet"
    shown = run("export", "--run", run_dir, "--to", file, "--split", "test", "--neighbours", 0)
    assert shown.stdout == ""
    assert "12 images; x and y: t-SNE" in shown.stderr
    assert f"wrote {file}; open it:" in shown.stderr
    assert f"embedding-atlas: embedding-atlas {file} --text caption --x x --y y\n" in shown.stderr
    assert "neighbours" not in pq.read_schema(file).names
    run("export", "--run", run_dir, "--to", file, "--split", "dev")  # its own file is replaced
    assert set(pq.read_table(file).column("split").to_pylist()) == {"dev"}


def test_a_file_of_somebody_else_s_is_left_alone(fails, run_dir, tmp_path):
    file = tmp_path / "mine.parquet"
    file.write_text("mine")
    message = fails("export", "--run", run_dir, "--to", file)
    assert message == f"{file} was not written by this program, and is left as it is; name another file"
    assert file.read_text() == "mine"


def test_a_table_that_was_changed_since_is_left_alone(run, fails, run_dir, tmp_path):
    file = tmp_path / "few.parquet"
    run("export", "--run", run_dir, "--to", file, "--split", "dev")
    changed = pq.read_table(file).drop_columns(["x"])
    pq.write_table(changed, file)
    assert "was changed since it was written" in fails("export", "--run", run_dir, "--to", file)
    assert pq.read_table(file) == changed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-", "- is no name of a Parquet file; name one that ends in .parquet"),
        ("out.csv", "out.csv is no name of a Parquet file; name one that ends in .parquet"),
        ("folder.parquet", "folder.parquet is a folder; a regular file is needed"),
        ("file/out.parquet", "file is no folder; name a file in one"),
    ],
)
def test_a_place_that_no_table_can_be_written_to_is_refused(fails, run_dir, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").write_text("x")
    assert fails("export", "--run", run_dir, "--to", name) == message


def test_a_split_that_the_run_lacks_is_named(fails, run_dir, tmp_path):
    message = fails("export", "--run", run_dir, "--to", tmp_path / "x.parquet", "--split", "tset")
    assert message == "the run has no images in the split 'tset'; its splits: dev, test, train"
    assert not (tmp_path / "x.parquet").exists()


def test_a_full_disk_leaves_the_table_that_was_there(run_dir, tmp_path, monkeypatch):
    file = workflows.export(run_dir, tmp_path / "few.parquet", split="dev")
    before = file.read_bytes()
    written = []

    def full(self, data):
        written.append(len(data))
        if sum(written) > 3000:
            raise OSError(28, "No space left on device")
        return io.FileIO.write(self, data)

    monkeypatch.setattr("onceover.base.files.ForgivingFile.write", full)
    with pytest.raises(OSError, match="No space left"):
        workflows.export(run_dir, file)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob(".few*aside*"))


def test_images_that_are_gone_or_changed_are_refused(run_dir, tmp_path, drawn):
    file = tmp_path / "x.parquet"
    data = shutil.copytree(drawn, tmp_path / "data")
    (data / "images/0007.jpg").write_bytes((data / "images/0008.jpg").read_bytes())
    with pytest.raises(ExportError, match=r"0007\.jpg is not the image that was encoded; restore it"):
        workflows.export(run_dir, file, with_images=True, data=data)
    (data / "images/0007.jpg").unlink()
    with pytest.raises(ExportError, match=r"1 of 60 images are not there \(the first: .*0007\.jpg\)"):
        workflows.export(run_dir, file, with_images=True, data=data)
    with pytest.raises(OnceoverError, match=r"gone is not there; name the dataset's folder or file"):
        workflows.export(run_dir, file, with_images=True, data=tmp_path / "gone")
    assert not file.exists()


def test_captions_have_no_images(fails, run_dir, tmp_path):
    file = tmp_path / "x.parquet"
    message = fails("export", "--run", run_dir, "--to", file, "--kind", "text", "--with-images")
    assert message == "a row that is a caption holds no image; take the kind image, or leave the images out"


def test_a_file_that_is_no_table_of_vectors_is_not_explained(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(OnceoverError, match="is no table of vectors; export and embed write them"):
        ways_to_open(file)
