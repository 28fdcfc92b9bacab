"""Stores that are folders of shards: the same rows as in one file, kills, growth, pruning, refusals, every command."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from torch import nn

from onceover.base.errors import OnceoverError
from onceover.extract import sealing, store_form
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.repack import repack
from onceover.extract.store import FeatureStore, StoreError, parts_folder
from onceover.heads.chunks import Chunks


@pytest.fixture(scope="module")
def config(extract_config, tiny_resnet):
    """Small batches, so that 60 images make several shards."""
    return dataclasses.replace(extract_config, image_encoder=f"hf:{tiny_resnet}@random", batch_size=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory, drawn, config):
    """The drawn dataset as one file and as a folder."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("drawn.h5", "drawn.store"):
        extract(read_dataset(drawn), folder / name, config, device="cpu")
    return folder


@pytest.fixture
def folder_store(made, tmp_path):
    """A copy of the folder to do harm to, beside the dataset that it was made of."""
    return Path(shutil.copytree(made / "drawn.store", tmp_path / "drawn.store"))


@pytest.fixture
def data(drawn, tmp_path):
    """A copy of the drawn dataset to do harm to."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


def contents(path):
    """All that a store holds, as plain values and arrays; times of files aside."""
    with FeatureStore(path) as store:
        texts = [store.image_ids, store.image_paths, store.image_splits, store.sha256, store.captions]
        numbers = [store.image_index, store.truncated, store.unknown, store.tokens, store.image_stats()[0]]
        thumbnails = store.thumbnails()
        return [
            store.image_features[:].tobytes(),
            store.text_features[:].tobytes(),
            *texts,
            *(column if column is None else column.tolist() for column in numbers),
            None if thumbnails is None else list(thumbnails),
            store.failures,
            store.tokenizer_files,
            store.recipes,
            store.fingerprints,
        ]


def shards(folder):
    """The shards of a folder, with the number and the modification time of each file."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*-*.h5")}


def without(data, names):
    """Takes the captions of some images out of a dataset's table."""
    table = data / "captions.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if not line.startswith(names)))


def message(call, *given, **named):
    with pytest.raises(OnceoverError) as error:
        call(*given, **named)
    return str(error.value)


def test_a_folder_holds_the_same_rows_as_one_file_and_keeps_its_shards(made):
    assert contents(made / "drawn.store") == contents(made / "drawn.h5")
    names = {file.name for file in (made / "drawn.store").iterdir()}
    assert names == {"manifest.h5", *shards(made / "drawn.store")}
    assert len([name for name in names if name.startswith("image-")]) > 4
    assert not parts_folder(made / "drawn.store").exists()
    with FeatureStore(made / "drawn.store") as store:
        assert store.verify() == []
        assert store.is_checked
        assert store.nbytes == sum(file.stat().st_size for file in (made / "drawn.store").iterdir())


class Killed(BaseException):
    """A kill, after which nothing is tidied up that matters."""


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, drawn, config):
    """The folder of an extraction that was killed when all its shards were there."""

    def killed(*_, **__):
        raise Killed

    path = tmp_path_factory.mktemp("encoded") / "s.store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onceover.extract.pipeline.seal", killed)
        with pytest.raises(Killed):
            extract(read_dataset(drawn), path, config, device="cpu")
    return parts_folder(path)


def test_sealing_links_the_shards_and_copies_none(drawn, tmp_path, config, encoded, monkeypatch):
    shutil.copytree(encoded, parts_folder(tmp_path / "s.store"))
    linked = {}

    def noted(source, target):
        if Path(target).parent.name == "s.store":
            linked[Path(target).name] = Path(source).stat().st_ino
        link(source, target)

    link = os.link
    monkeypatch.setattr(os, "link", noted)
    monkeypatch.setattr(sealing, "write_bytes", lambda *_: pytest.fail("a shard was written anew"))
    extract(read_dataset(drawn), tmp_path / "s.store", config, device="cpu")
    assert sorted(linked.values()) == sorted(inode for inode, _ in shards(tmp_path / "s.store").values())


def test_a_file_system_without_links_gets_copies(made, drawn, tmp_path, config, encoded, monkeypatch):
    shutil.copytree(encoded, parts_folder(tmp_path / "s.store"))

    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    extract(read_dataset(drawn), tmp_path / "s.store", config, device="cpu")
    assert contents(tmp_path / "s.store") == contents(made / "drawn.store")
    assert sorted(shards(tmp_path / "s.store")) == sorted(shards(made / "drawn.store"))


def test_repacking_either_way_keeps_every_value_and_what_extract_knows(made, drawn, tmp_path, config):
    for source, path in (("drawn.store", tmp_path / "file.h5"), ("drawn.h5", tmp_path / "folder")):
        assert not repack(made / source, path).up_to_date
        assert contents(path) == contents(made / "drawn.h5")
        with FeatureStore(path) as store:
            assert store.verify() == []
        assert extract(read_dataset(drawn), path, config, device="cpu").up_to_date
        assert repack(made / source, path).up_to_date
    assert (tmp_path / "folder" / "manifest.h5").is_file()  # the form that the source has not
    assert "holds another store" in message(repack, made / "drawn.store", tmp_path / "folder")
    assert "is the store itself" in message(repack, tmp_path / "folder", tmp_path / "folder")


@pytest.mark.parametrize(
    "rows",
    [
        [5],
        [59, 0, 30, 30, -1],
        slice(10, 50),
        slice(50, 10, -3),
        slice(0, 0),
        np.array([], int),
        (slice(3, 9), 1),
        7,
    ],
    ids=str,
)
def test_rows_are_those_of_an_array(made, rows):
    with FeatureStore(made / "drawn.store") as store:
        for features in (store.image_features, store.text_features):
            whole = features[:]
            expected = whole[rows] if not isinstance(rows, tuple) else whole[rows[0]][:, rows[1]]
            np.testing.assert_array_equal(features[rows], expected)
        chosen = np.arange(60) % 7 == 0
        np.testing.assert_array_equal(store.image_features[chosen], store.image_features[:][chosen])
        with pytest.raises(IndexError):
            store.image_features[[60]]


def test_killed_at_any_step_of_sealing_the_store_is_absent_or_whole_and_the_next_call_completes_it(
    made, drawn, tmp_path, config, encoded, monkeypatch
):
    path = tmp_path / "s.store"
    dataset = read_dataset(drawn)
    shutil.copytree(encoded, parts_folder(path))
    replace = os.replace
    kills = 0
    for step in range(1, 100, 15):
        left = [step]

        def dying(source, target, left=left):
            if Path(target).parent == path:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        try:
            extract(dataset, path, config, device="cpu")
        except Killed:
            kills += 1
            assert "is unfinished" in message(FeatureStore, path)
            continue
        break
    assert kills == 2
    assert contents(path) == contents(made / "drawn.store")
    assert sorted(shards(path)) == sorted(shards(made / "drawn.store"))
    assert not parts_folder(path).exists()


def test_new_images_add_shards_and_leave_those_that_are_there(made, data, tmp_path, config):
    path = tmp_path / "s.store"
    whole = (data / "captions.csv").read_text()
    without(data, "images/000")
    extract(read_dataset(data), path, config, device="cpu")
    (path / "notes.txt").write_text("mine")
    before = shards(path)
    (data / "captions.csv").write_text(whole)
    summary = extract(read_dataset(data), path, config, device="cpu")
    assert (summary.computed["image"], summary.reused["image"]) == (10, 50)
    after = shards(path)
    assert before.items() <= after.items()
    assert len(after) > len(before)
    assert (path / "notes.txt").read_text() == "mine"
    assert contents(path)[2:6] == contents(made / "drawn.store")[2:6]
    with FeatureStore(path) as store:
        assert store.verify() == []


def test_pruned_rows_leave_every_file_and_files_of_others_stay(data, folder_store, config):
    (folder_store / "image-mine.h5").write_bytes(b"mine")
    (folder_store / ("image-" + 24 * "0" + ".h5")).write_bytes(b"mine too")
    with FeatureStore(folder_store) as store:
        gone = store.sha256[store.image_ids.index("images/0007.jpg")]
        features = dict(zip(store.image_ids, store.image_features[:], strict=True))
    without(data, "images/0007")
    dataset = dataclasses.replace(read_dataset(data), root=data)
    assert "--prune" in message(extract, dataset, folder_store, config, device="cpu")
    extract(dataset, folder_store, config, device="cpu", prune=True)
    for file in folder_store.iterdir():
        assert gone.encode() not in file.read_bytes()
    assert (folder_store / "image-mine.h5").read_bytes() == b"mine"
    assert (folder_store / ("image-" + 24 * "0" + ".h5")).read_bytes() == b"mine too"
    with FeatureStore(folder_store) as store:
        assert len(store.image_ids) == 59
        assert store.verify() == []
        for name, row in zip(store.image_ids, store.image_features[:], strict=True):
            np.testing.assert_array_equal(row, features[name])


def test_other_features_replace_a_folder_only_with_force_and_its_shards_go(drawn, folder_store, config):
    other = dataclasses.replace(config, views=1)
    before = shards(folder_store)
    (folder_store / "notes.txt").write_text("mine")
    assert "replace them with --force" in message(extract, read_dataset(drawn), folder_store, other, device="cpu")
    assert shards(folder_store) == before
    extract(read_dataset(drawn), folder_store, other, device="cpu", force=True)
    assert not {name for name in shards(folder_store) if name.startswith("image")} & before.keys()
    assert (folder_store / "notes.txt").read_text() == "mine"
    with FeatureStore(folder_store) as store:
        assert store.image_features.shape == (60, 1, 16)
        assert store.verify() == []


def test_without_thumbnails_none_stay_in_the_shards(drawn, folder_store, config):
    bare = dataclasses.replace(config, thumbnails=False)
    extract(read_dataset(drawn), folder_store, bare, device="cpu")
    with FeatureStore(folder_store) as store:
        assert store.thumbnails() is None
        assert store.verify() == []
    for name in shards(folder_store):
        with h5py.File(folder_store / name) as file:
            assert "thumbnail" not in file.get("image", ())


def damage(file):
    """Changes a byte in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_missing_or_foreign_shard_is_named_and_its_rows_are_not_read(folder_store):
    names = sorted(name for name in shards(folder_store) if name.startswith("image"))
    whole = (folder_store / names[0]).read_bytes()
    damage(folder_store / names[0])
    with FeatureStore(folder_store) as store:
        [problem] = store.verify()
        assert f"{names[0]} is damaged: its bytes do not match their checksum" in problem
        assert f"{names[0]} is damaged" in message(lambda: store.image_features[:])
        assert store.text_features[:].shape == (300, 32)
    shutil.copy(folder_store / names[1], folder_store / names[0])
    with FeatureStore(folder_store) as store:
        assert f"{names[0]} is not the shard that the manifest names" in message(lambda: store.image_features[:])
    (folder_store / names[0]).unlink()
    assert f"lacks 1 of its shards (the first: {names[0]})" in message(FeatureStore, folder_store)
    (folder_store / names[0]).write_bytes(whole)
    with FeatureStore(folder_store) as store:
        assert store.verify() == []
        (folder_store / names[0]).write_bytes(whole[:-1])
        assert "was changed while it was in use" in message(lambda: store.image_features[:])


def test_rows_of_a_missing_shard_alone_are_encoded_again(made, drawn, folder_store, config):
    names = sorted(shards(folder_store))
    kept = shards(folder_store)
    for name in (names[0], names[-1]):
        (folder_store / name).unlink()
        del kept[name]
    summary = extract(read_dataset(drawn), folder_store, config, device="cpu")
    assert 0 < summary.computed["image"] < 10
    assert 0 < summary.computed["text"] < 60
    assert kept.items() <= shards(folder_store).items()
    with FeatureStore(folder_store) as store, FeatureStore(made / "drawn.store") as origin:
        assert store.verify() == []
        np.testing.assert_allclose(store.text_features[:], origin.text_features[:], atol=1e-5)
    assert extract(read_dataset(drawn), folder_store, config, device="cpu").up_to_date


def test_a_shard_that_is_a_link_is_not_read(folder_store, tmp_path):
    name = next(iter(shards(folder_store)))
    (folder_store / name).rename(tmp_path / "elsewhere.h5")
    (folder_store / name).symlink_to(tmp_path / "elsewhere.h5")
    with FeatureStore(folder_store) as store:
        [problem] = store.verify()
    assert "is a link that leads out of the store" in problem


def test_a_damaged_manifest_is_refused(folder_store):
    damage(folder_store / "manifest.h5")
    assert "manifest.h5 is damaged" in message(FeatureStore, folder_store)


def test_what_is_no_folder_store_gets_one_line(made, tmp_path, drawn, config):
    dataset = read_dataset(drawn)
    assert "holds something else than a feature store (captions.csv); name another store" in message(
        extract, dataset, drawn, config, device="cpu"
    )
    (tmp_path / "empty").mkdir()
    assert "is a folder without manifest.h5, and so no feature store" in message(FeatureStore, tmp_path / "empty")
    assert "is the manifest of a feature store; name the folder" in message(
        FeatureStore, made / "drawn.store" / "manifest.h5"
    )
    assert "name it without the slash" in message(extract, dataset, f"{made}/drawn.h5/", config, device="cpu")
    shutil.copytree(made / "drawn.store", tmp_path / "x.store")
    shutil.copy(made / "drawn.h5", tmp_path / "x.store" / "manifest.h5")
    assert "manifest.h5 is an HDF5 file, but no feature store" in message(FeatureStore, tmp_path / "x.store")


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.h5", "file"), ("a.hdf5", "file"), ("a.store", "folder"), ("a/", "folder"), ("a.h5/", "folder"), ("a", None)],
)
def test_the_name_of_a_store_says_its_form(tmp_path, name, form):
    assert store_form.store_place(f"{tmp_path}/{name}").form == form


def test_a_name_that_says_nothing_gets_a_folder_from_a_size_on(drawn, tmp_path, config, monkeypatch):
    dataset = read_dataset(drawn).first(20)
    extract(dataset, tmp_path / "small", config, device="cpu")
    assert (tmp_path / "small").is_file()
    monkeypatch.setattr(store_form, "FOLDER_BYTES", 1000)
    extract(dataset, tmp_path / "large", config, device="cpu")
    assert (tmp_path / "large" / "manifest.h5").is_file()
    extract(read_dataset(drawn), tmp_path / "small", config, device="cpu")
    assert (tmp_path / "small").is_file()  # what is there keeps its form


def test_a_closed_store_says_so(made):
    with FeatureStore(made / "drawn.store") as store:
        pass
    with pytest.raises(StoreError, match="was closed before all of it was read"):
        store.captions  # noqa: B018


def test_commands_give_the_same_with_a_folder_as_with_a_file(made, drawn, tmp_path, run, fails):
    cpu = ("--device", "cpu")
    settings = {"model.embedding_dim": 16, "training.num_epochs": 1, "training.batch_size": 16, "training.cca": "false"}
    settings["training.refit"] = "false"
    small = [*cpu, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]
    results = {}
    for store in (made / "drawn.h5", made / "drawn.store"):
        folder = tmp_path / store.suffix
        run("fit", "--store", store, "--run", folder, *small)
        evaluated = run("evaluate", "--run", folder, "--json", "-").stdout
        baselines = run("evaluate", "--store", store, "--json", "-").stdout
        table = folder.with_suffix(".parquet")
        run("export", "--run", folder, "--to", table, "--neighbours", 0, "--with-images", "--store", store)
        described = run("info", store).stdout
        assert "60: 36 train, 12 dev, 12 test" in described
        heads = (folder / "heads.safetensors").read_bytes()
        results[store.suffix] = (heads, numbers_in(evaluated), numbers_in(baselines), table.stat().st_size)
    assert results[".h5"] == results[".store"]
    assert "a folder of " in described
    assert run("verify", made / "drawn.store", "--sample", 2, *cpu).stdout.endswith("drawn.store is sound\n")
    run(
        "sweep",
        "--store",
        made / "drawn.store",
        "--out",
        tmp_path / "sweep",
        "--grid",
        "model.temperature=0.05",
        *small,
    )
    run("report", "--run", tmp_path / ".store", "--out", tmp_path / "report.html")
    assert "is not there" not in (tmp_path / "report.html").read_text()  # figures of the store are among the others
    assert "hold features of the same encoders" in fails(
        "join", made / "drawn.store", made / "drawn.h5", "--out", tmp_path / "joined/"
    )
    run("repack", made / "drawn.h5", "--to", f"{tmp_path}/other/")
    assert contents(tmp_path / "other") == contents(made / "drawn.store")


def numbers_in(result):
    """The recalls of a result in JSON."""
    models = json.loads(result)["models"]
    return {name: (row["image_to_text"], row["text_to_image"]) for name, row in models.items()}


def test_a_run_of_a_folder_is_indexed_searched_joined_and_fine_tuned_as_one_of_a_file(
    made, drawn, config, tiny_resnet, tmp_path, run
):
    cpu = ("--device", "cpu")
    small = ("--set", "model.embedding_dim=16", "--set", "training.num_epochs=2", "--set", "training.batch_size=16")
    small += ("--set", "training.refit=false")
    query = ("--query", "a red circle", "--json", *cpu)
    second = dataclasses.replace(config, image_encoder=f"hf:{tiny_resnet}", text_pooling="cls")
    extract(read_dataset(drawn), tmp_path / "second.store", second, device="cpu")
    results = {}
    for name, joined in (("drawn.h5", "joined.h5"), ("drawn.store", "joined.store")):
        store = made / name
        folder = tmp_path / name
        run("fit", "--store", store, "--run", folder / "run", *small, *cpu)
        searched = json.loads(run("search", "--run", folder / "run", *query).stdout)["hits"]
        run("index", "--run", folder / "run")
        indexed = json.loads(run("search", "--index", folder / "run/index", *query).stdout)["hits"]
        run("ensemble", folder / "run", folder / "run", "--out", folder / "ensemble")
        run("join", store, tmp_path / "second.store", "--out", tmp_path / joined)
        run("fit", "--store", tmp_path / joined, "--run", folder / "of joined", *small, *cpu)
        of_joined = json.loads(run("search", "--run", folder / "of joined", *query).stdout)["hits"]
        tuned = ("--out", folder / "tuned", "--unfreeze", "image.last1", "--set", "finetune.num_epochs=1")
        run("finetune", "--run", folder / "run", "--data", drawn, "--store", store, *tuned, "--re-extract", *cpu)
        evaluations = [run("evaluate", "--run", folder / kind, "--json", "-").stdout for kind in ("ensemble", "tuned")]
        results[name] = [scores(searched), scores(indexed), scores(of_joined), *map(numbers_in, evaluations)]
    assert results["drawn.store"] == results["drawn.h5"]
    assert (tmp_path / "joined.store").is_dir()
    assert contents(tmp_path / "joined.store") == contents(tmp_path / "joined.h5")


def scores(hits):
    return [(hit["id"], hit["score"]) for hit in hits]


def test_features_are_imported_into_a_folder(tmp_path, run):
    generator = np.random.default_rng(0)
    images = generator.standard_normal((2500, 4)).astype(np.float32)
    texts = generator.standard_normal((2500, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "texts.npy", texts)
    rows = [f"{row}.jpg,one caption for all,{'train' if row % 2 else 'dev'}\n" for row in range(2500)]
    (tmp_path / "captions.csv").write_text("image,caption,split\n" + "".join(rows))
    given = ("--image-features", tmp_path / "images.npy", "--text-features", tmp_path / "texts.npy")
    command = ("import", *given, "--captions", tmp_path / "captions.csv", "--store", f"{tmp_path}/mine/")
    run(*command)
    with FeatureStore(tmp_path / "mine") as store:
        np.testing.assert_array_equal(store.image_features[:, 0], images)
        np.testing.assert_array_equal(store.text_features[:], texts)  # rows of their own, though the captions are equal
        assert store.shards.table.rows.tolist() == [1024, 1024, 452] * 2
        assert store.verify() == []
    assert "is up to date; nothing to import" in run(*command).stderr


def test_the_chunks_of_a_fit_are_the_same_from_a_folder_as_from_a_file(made):
    dealt = {}
    for name in ("drawn.h5", "drawn.store"):
        with FeatureStore(made / name) as store:
            plain = {kind: nn.Identity() for kind in ("image", "text")}
            chunks = Chunks(store, store.roles().train, store.image_index, plain, 3, "cpu")
            epoch = list(chunks.epoch(np.random.default_rng(0)))
        dealt[name] = [(chunk.image_rows.tolist(), chunk.images.tolist(), chunk.texts.tolist()) for chunk in epoch]
    assert len(dealt["drawn.h5"]) > 0
    assert dealt["drawn.store"] == dealt["drawn.h5"]


def test_repacking_with_force_replaces_a_folder_that_lacks_a_shard(made, folder_store):
    next(folder_store.glob("image-*.h5")).unlink()
    assert "lacks 1 of its shards" in message(repack, made / "drawn.h5", folder_store)
    repack(made / "drawn.h5", folder_store, force=True)
    assert contents(folder_store) == contents(made / "drawn.h5")
