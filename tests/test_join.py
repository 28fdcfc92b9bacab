"""Joined stores: the columns of each encoder, rows in whatever order, what is refused, and all that follows a fit."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import onceover
from onceover.extract.dataset import Dataset
from onceover.extract.joined import joined_recipe, shared_views
from onceover.extract.joining import join_stores
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def second_config(extract_config, tiny_clip):
    """Another image encoder with more views, and the same text encoder with another pooling."""
    return dataclasses.replace(extract_config, image_encoder=f"hf:{tiny_clip}", text_pooling="cls", views=3)


@pytest.fixture(scope="module")
def second_file(tmp_path_factory, drawn, second_config):
    """A store of the drawn images by other encoders, its rows in the opposite order, without thumbnails."""
    path = tmp_path_factory.mktemp("second") / "second.h5"
    config = dataclasses.replace(second_config, thumbnails=False)
    extract(turned(read_dataset(drawn)), path, config, device="cpu")
    return path


@pytest.fixture(scope="module")
def joined_file(tmp_path_factory, store_file, second_file):
    path = tmp_path_factory.mktemp("joined") / "joined.h5"
    join_stores([store_file, second_file], path)
    return path


@pytest.fixture(scope="module")
def joined_run(tmp_path_factory, joined_file, fit_config):
    folder = tmp_path_factory.mktemp("joined-run") / "run"
    onceover.fit(joined_file, folder, fit_config, device="cpu")
    return folder


def turned(dataset: Dataset) -> Dataset:
    """The dataset with images and captions from the last to the first."""
    return dataclasses.replace(
        dataset,
        ids=dataset.ids[::-1],
        paths=dataset.paths[::-1],
        splits=dataset.splits[::-1],
        captions=dataset.captions[::-1],
        image_index=len(dataset.ids) - 1 - dataset.image_index[::-1],
    )


def refusal(stores, path, **options) -> str:
    """The one line of a refused join, which has left nothing behind."""
    before = {file for file in path.parent.iterdir() if file.suffix != ".lock"}
    with pytest.raises(onceover.OnceoverError) as raised:
        join_stores(stores, path, **options)
    assert {file for file in path.parent.iterdir() if file.suffix != ".lock"} == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_joined_row_holds_the_columns_of_each_store_in_turn(store_file, second_file, joined_file):
    with FeatureStore(store_file) as a, FeatureStore(second_file) as b, FeatureStore(joined_file) as joined:
        assert b.image_ids != a.image_ids
        assert joined.image_ids == a.image_ids
        assert joined.captions == a.captions
        assert joined.fingerprints["dataset"] == a.fingerprints["dataset"]
        images = [b.image_ids.index(name) for name in a.image_ids]
        assert joined.image_features.shape == (60, 2, a.dims[0] + b.dims[0])
        np.testing.assert_array_equal(joined.image_features[:][..., : a.dims[0]], a.image_features[:])
        np.testing.assert_array_equal(joined.image_features[:][..., a.dims[0] :], b.image_features[images][:, :2])
        captions = []
        for row, caption in enumerate(a.captions):
            image = b.image_ids.index(a.image_ids[a.image_index[row]])
            captions.append(
                next(own for own, text in enumerate(b.captions) if text == caption and b.image_index[own] == image)
            )
        np.testing.assert_array_equal(joined.text_features[:][:, : a.dims[1]], a.text_features[:])
        np.testing.assert_array_equal(joined.text_features[:][:, a.dims[1] :], b.text_features[captions])
        assert list(joined.thumbnails()) == list(a.thumbnails())
        assert joined.verify() == []


def test_the_recipe_holds_those_of_the_parts_and_the_provenance_what_loads_them(
    store_file, second_file, joined_file, extract_config, second_config
):
    with FeatureStore(store_file) as a, FeatureStore(second_file) as b, FeatureStore(joined_file) as joined:
        assert joined.recipes["image"]["parts"] == [a.recipes["image"], b.recipes["image"]]
        assert joined.recipes["image"] == joined_recipe("image", [a.recipes["image"], b.recipes["image"]], "float32")
        assert joined.recipes["image"]["views"] == a.recipes["image"]["views"]
        record = joined.provenance["image"]
        assert record["encoder"] == f"{extract_config.image_encoder} + {second_config.image_encoder}"
        assert [part["dim"] for part in record["parts"]] == [a.dims[0], b.dims[0]]
        assert record["parts"][1]["settings"]["views"] == 3
        assert joined.provenance["joined"]["stores"] == [str(store_file), str(second_file)]
        assert set(joined.tokenizer_files) == {f"{part}.{name}" for part in (0, 1) for name in a.tokenizer_files}


def test_views_are_those_that_all_show_alike_from_the_first_on():
    crops = [[None, False], [None, True], ["whole", False], ["whole", True]]
    plain = [[None, False], [None, True], [[0.0, 0.0], False]]
    assert shared_views([{"views": crops}, {"views": plain}]) == crops[:2]
    assert shared_views([{"views": crops}, {"shape": [1, 8]}]) == crops[:1]
    assert shared_views([{"shape": [2, 8]}, {"shape": [3, 8]}]) == ["unknown"] * 2


def test_an_encoder_that_the_stores_share_is_taken_once(store_file, drawn, extract_config, tmp_path):
    config = dataclasses.replace(extract_config, text_pooling="cls")
    extract(read_dataset(drawn), tmp_path / "b.h5", config, device="cpu")
    joined = onceover.join([store_file, tmp_path / "b.h5"], tmp_path / "ab.h5")
    with FeatureStore(store_file) as a, joined:
        assert joined.dims == (a.dims[0], 2 * a.dims[1])
        assert joined.recipes["image"] == a.recipes["image"]
        assert joined.fingerprints["image"] == a.fingerprints["image"]
        assert joined.provenance["settings"]["image_encoder"] == a.provenance["settings"]["image_encoder"]
    again = onceover.join([tmp_path / "ab.h5", tmp_path / "b.h5", store_file], tmp_path / "again.h5")
    assert again.fingerprints == joined.fingerprints
    message = refusal([store_file, store_file], tmp_path / "same.h5")
    assert message == f"{store_file} and {store_file} hold features of the same encoders; there is nothing to join"


def test_a_joined_store_is_joined_again(store_file, second_file, joined_file, drawn, extract_config, tmp_path):
    config = dataclasses.replace(extract_config, seed=1, views=1)
    extract(read_dataset(drawn), tmp_path / "c.h5", config, device="cpu")
    with (
        onceover.join([joined_file, tmp_path / "c.h5"], tmp_path / "abc.h5") as nested,
        onceover.join([store_file, second_file, tmp_path / "c.h5"], tmp_path / "flat.h5") as flat,
    ):
        assert nested.fingerprints == flat.fingerprints
        assert len(nested.recipes["image"]["parts"]) == 3
        assert len(nested.recipes["text"]["parts"]) == 2  # the third store's is the first one's
        np.testing.assert_array_equal(nested.image_features[:], flat.image_features[:])
        np.testing.assert_array_equal(nested.text_features[:], flat.text_features[:])
        assert nested.image_features.shape[1] == 1


@pytest.fixture
def write_second(second_config, second_file, tmp_path):
    """Writes the features of the second encoders for some dataset, those that are there already without encoding."""

    def write(dataset, name="b.h5"):
        with FeatureStore(second_file) as store:
            config = dataclasses.replace(second_config, thumbnails=False)
            extract(dataset, tmp_path / name, config, device="cpu", reuse=store)
        return tmp_path / name

    return write


@pytest.fixture
def smaller(drawn, write_second):
    """A store without five of the 60 images and without one more caption."""
    dataset = read_dataset(drawn).first(55)
    return write_second(
        dataclasses.replace(dataset, captions=dataset.captions[:-1], image_index=dataset.image_index[:-1])
    )


def test_rows_that_a_store_lacks_are_refused_with_numbers_or_left_out_with_a_record(store_file, smaller, tmp_path):
    message = refusal([store_file, smaller], tmp_path / "ab.h5")
    assert message == (
        f"the stores do not hold the same rows: 5 images and 26 captions of {store_file} that {smaller} lacks; "
        "extract what is missing, or join what all have with --common"
    )
    for stores in ([store_file, smaller], [smaller, store_file]):
        joined = onceover.join(stores, tmp_path / "ab.h5", common=True, force=True)
        with FeatureStore(store_file) as whole, joined:
            assert joined.image_ids == whole.image_ids[:55]
            assert (len(joined.captions), joined.verify()) == (274, [])
            assert [failure.id for failure in joined.failures if failure.stage == "dataset"] == whole.image_ids[55:]
            assert sum(failure.stage == "caption" for failure in joined.failures) == 26
            assert {failure.reason for failure in joined.failures} == {"not joined: b.h5 lacks it"}


def test_an_image_that_keeps_no_caption_is_left_out(store_file, drawn, write_second, tmp_path):
    dataset = read_dataset(drawn)
    pairs = zip(dataset.captions, dataset.image_index, strict=True)
    other = write_second(
        dataclasses.replace(dataset, captions=[text if image else f"{text} Indeed." for text, image in pairs])
    )
    joined = onceover.join([store_file, other], tmp_path / "ab.h5", common=True)
    with joined:
        assert joined.image_ids == dataset.ids[1:]
        assert joined.image_index.min() == 0
        assert joined.verify() == []
        assert joined.failures[-1][:3] == (dataset.ids[0], "dataset", "not joined: no caption that all stores have")


def test_other_splits_and_nothing_in_common_are_refused(store_file, drawn, write_second, tmp_path):
    dataset = read_dataset(drawn)
    splits = ["test" if split == "dev" else split for split in dataset.splits]
    other = write_second(dataclasses.replace(dataset, splits=splits))
    message = refusal([store_file, other], tmp_path / "ab.h5", common=True)
    assert message.startswith(f"12 images lie in other splits in {tmp_path}/b.h5 than in {store_file} (the first: ")
    assert message.endswith(", dev and test); extract both with the same splits")
    alone = dataclasses.replace(dataset.first(1), captions=["Nothing of it."], image_index=np.zeros(1, np.int64))
    message = refusal([store_file, write_second(alone, "c.h5")], tmp_path / "ac.h5", common=True)
    assert "have no image and no caption in common; join stores of one dataset" in message


def test_a_file_that_is_there_is_kept_unless_told_otherwise(run, fails, store_file, second_file, joined_file, tmp_path):
    out = tmp_path / "out.h5"
    done = run("join", store_file, second_file, "--out", out)
    assert done.stderr.splitlines()[-2:] == [
        f"wrote {out}",
        f"next: onceover fit --store {out} --run runs/first",
    ]
    assert "joining 60 images and 300 captions, without encoding" in done.stderr
    assert "views of each image: 2, those that all have; the stores have 2 to 3" in done.stderr
    before = out.read_bytes()
    assert f"{out} is up to date; nothing to join" in run("join", store_file, second_file, "--out", out).stderr
    assert out.read_bytes() == before
    shutil.copy(store_file, out)
    assert run("join", store_file, second_file, "--out", out, code=1).stderr.splitlines()[-1] == (
        f"error: {out} holds other features or rows; name another place, or replace them with --force"
    )
    assert out.read_bytes() == store_file.read_bytes()
    run("join", store_file, second_file, "--out", out, "--force")
    with FeatureStore(out) as store, FeatureStore(joined_file) as joined:
        assert store.fingerprints == joined.fingerprints
    copy = shutil.copy(store_file, tmp_path / "copy.h5")
    assert "is one of the stores to join" in fails("join", copy, second_file, "--out", copy, "--force")
    assert "name two stores or more" in fails("join", store_file, "--out", tmp_path / "x.h5")
    (tmp_path / "own.h5").write_text("mine")
    assert "own.h5" in fails("join", store_file, second_file, "--out", tmp_path / "own.h5", "--force")
    assert (tmp_path / "own.h5").read_text() == "mine"


def test_a_full_disk_is_noticed_before_anything_is_written(store_file, second_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(onceover.OnceoverError, match="make room"):
        join_stores([store_file, second_file], tmp_path / "ab.h5")
    assert not (tmp_path / "ab.h5").exists()


def test_a_joined_run_is_evaluated_drawn_described_and_verified(
    run, joined_file, joined_run, extract_config, second_config, drawn, tmp_path, one_format
):
    first, second = extract_config.image_encoder, second_config.image_encoder
    models = json.loads(run("evaluate", "--run", joined_run, "--json").stdout)["models"]
    assert models["multimodal"]["rsum"] > models["chance"]["rsum"]
    assert "zero_shot" not in models
    about = run("info", joined_file).stdout
    assert f"{first} + {second}, 60 x 2 x " in about
    assert f"- {second}, 24 numbers" in about
    assert f"joined from {joined_file.parent}" not in about
    run("info", joined_run)
    run("plot", "--store", joined_file, "--out", tmp_path / "figures")
    said = run("verify", joined_file, "--sample", 12, "--data", drawn, *CPU)
    assert said.stdout.count("encoded again in float32") == 4
    assert f"image features of {second} (float32 by eager" in said.stdout


def test_queries_of_a_joined_run_pass_all_encoders(joined_run, joined_file, drawn):
    from onceover.heads.checkpoint import load_run

    loaded = load_run(joined_run)
    with FeatureStore(joined_file) as store:
        text = loaded.load_encoder("text", None, "cpu")
        features, truncated = text.encode(store.captions[:9])
        np.testing.assert_allclose(features, store.text_features[:9], atol=2e-5)
        assert not truncated.any()
        image = loaded.load_encoder("image", None, "cpu")
        data = (drawn / store.image_paths[3]).read_bytes()
        loaded.check_encoder("image", image.recipe)
        again = image.encode(image.read(data)[None])[0]
        np.testing.assert_allclose(again, store.image_features[3], rtol=1e-3, atol=2e-4)
        hits = onceover.search(loaded, store.captions[0], top_k=60, device="cpu")
        assert len(hits) == 60
        found = onceover.search(loaded, str(drawn / store.image_paths[0]), mode="image2text", device="cpu")
        assert len(found) == 5


def test_new_images_and_captions_are_indexed_with_all_encoders(run, joined_run, joined_file, drawn, tmp_path):
    said = run("index", "--run", joined_run, "--images", drawn / "images", "--index", tmp_path / "i", *CPU).stderr
    assert "60 images: 60 added" in said
    with FeatureStore(tmp_path / "i/images.h5") as indexed, FeatureStore(joined_file) as store:
        assert indexed.recipes["image"] == store.recipes["image"]
        by_content = {content: row for row, content in enumerate(store.sha256)}
        rows = [by_content[content] for content in indexed.sha256]
        np.testing.assert_allclose(indexed.image_features[:], store.image_features[rows], rtol=1e-3, atol=2e-4)
    again = run("index", "--run", joined_run, "--images", drawn / "images", "--index", tmp_path / "i", *CPU).stderr
    assert "encoding" not in again
    run("search", "--index", tmp_path / "i", "--query", "a red circle", *CPU)
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle\na blue star above a green square\n")
    run("index", "--run", joined_run, "--captions", captions, "--index", tmp_path / "c", *CPU)
    run("search", "--index", tmp_path / "c", "--query", drawn / "query.jpg", "--mode", "image2text", *CPU)
    assert f"{tmp_path}/i/images.h5 is sound" in run("verify", tmp_path / "i/images.h5", "--sample", 3, *CPU).stdout


def test_encoders_that_have_moved_are_named_one_by_one(fails, run, joined_run, tiny_bert, tmp_path):
    moved = shutil.copytree(tiny_bert, tmp_path / "bert")
    query = ("search", "--run", joined_run, "--query", "a red circle", *CPU)
    run(*query, "--text-encoder", f"hf:{moved} + hf:{tiny_bert}")
    message = fails(*query, "--text-encoder", f"hf:{moved}")
    assert message.startswith("the text features come from 2 encoders; name the new location of each, in their order: ")


def test_what_needs_one_encoder_is_refused(fails, run, joined_run, joined_file, drawn, extract_config, tmp_path):
    tuned = ("--store", joined_file, "--data", drawn, "--out", tmp_path / "tuned")
    message = fails("finetune", "--run", joined_run, *tuned, *CPU)
    assert message.startswith(f"{joined_file} holds joined features of several encoders, and fine-tuning trains one")
    copy = shutil.copy(joined_file, tmp_path / "copy.h5")
    specs = ("--image-encoder", extract_config.image_encoder, "--text-encoder", extract_config.text_encoder)
    message = run("extract", "--data", drawn, "--store", copy, *specs, *CPU, code=1).stderr.splitlines()[-1]
    assert message == (
        f"error: {copy} holds joined image features of several encoders, and is not extended; extend the stores that "
        "it was joined from, and join them again with --force"
    )
    assert (tmp_path / "copy.h5").read_bytes() == joined_file.read_bytes()


def test_runs_of_two_stores_are_an_ensemble_on_the_joined_store(
    run, fails, run_dir, store_file, drawn, second_config, fit_config, changed, tmp_path
):
    """Each run's vectors are its own there; with heads of another kind, too."""
    other = dataclasses.replace(second_config, views=2)
    extract(read_dataset(drawn), tmp_path / "other.h5", other, device="cpu")
    mlp = changed(fit_config, model={"head": "mlp"}, training={"num_epochs": 1})
    onceover.fit(tmp_path / "other.h5", tmp_path / "second", mlp, device="cpu")
    join_stores([store_file, tmp_path / "other.h5"], tmp_path / "both.h5")
    runs = (run_dir, tmp_path / "second")
    refused = fails("ensemble", *runs, "--out", tmp_path / "both")
    assert "name with --store the one that onceover join made of theirs" in refused
    run("ensemble", *runs, "--store", tmp_path / "both.h5", "--out", tmp_path / "both")
    first, second, both = (onceover.read_embeddings(path / "embeddings.h5") for path in (*runs, tmp_path / "both"))
    images = np.concatenate([first.images, second.images], axis=1) / 2**0.5
    np.testing.assert_allclose(both.images, images, atol=1e-5)
    np.testing.assert_allclose(both.texts, np.concatenate([first.texts, second.texts], axis=1) / 2**0.5, atol=1e-5)
    found = run("search", "--run", tmp_path / "both", "--query", "A red circle .", "--json", *CPU)
    assert len(json.loads(found.stdout)["hits"]) == 5
    rows = json.loads(run("evaluate", "--run", tmp_path / "both", "--json").stdout)["models"]
    assert rows["multimodal"]["dimensions"] == both.images.shape[1]
    options = ("--store", tmp_path / "both.h5", "--out", tmp_path / "weighted")
    run("ensemble", *runs, "--weights", "3,1", *options)
    found = onceover.read_embeddings(tmp_path / "weighted/embeddings.h5").images
    expected = np.concatenate([first.images * 0.75**0.5, second.images * 0.5], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "give a number above 0 for each of 2 runs" in fails("ensemble", *runs, "--weights", "3,0", *options)
    assert "no list of numbers" in fails("ensemble", *runs, "--weights", "3;1", *options, code=2)
