"""Evaluation: on which images baselines are fitted, ranks that are kept, rows that stay, and other ways to count."""

import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from onceover import workflows
from onceover.base import threads
from onceover.base.files import read_record
from onceover.base.outputs import Outputs
from onceover.base.threads import available_cpus, bound_threads, worker_threads
from onceover.extract.encoding.devices import pick_device
from onceover.extract.store import FeatureStore
from onceover.heads.training import fit
from onceover.retrieval import baseline_cache, baseline_ranks, evaluation, store_pairs
from onceover.retrieval.baselines import choose, standardised
from onceover.retrieval.closed_form import CCA, Moments
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.evaluation import EvaluationError, evaluate
from onceover.retrieval.hubness import inverted_softmax_bias
from onceover.retrieval.metrics import report
from onceover.retrieval.ranks import Ranks, rank
from onceover.retrieval.regrouping import rank_equal_captions, rank_folds
from onceover.retrieval.tables import notes, table_rows

FITTED = ("cca", "ridge", "text_knn", "image_knn")


@pytest.fixture
def own_store(store_file, tmp_path):
    """A copy of the store, so that what is kept beside it is this test's."""
    return shutil.copy(store_file, tmp_path / "s.h5")


@pytest.fixture(scope="module")
def measured(store_file, tmp_path_factory):
    """A folder with a copy of the store, and the ranks of its baselines beside it."""
    folder = tmp_path_factory.mktemp("measured")
    with FeatureStore(shutil.copy(store_file, folder / "s.h5")) as store:
        evaluate(None, store)
    return folder


@pytest.fixture
def measured_store(measured, tmp_path):
    """A store of this test alone, beside which ranks are kept already."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    return tmp_path / "s.h5"


@pytest.fixture
def own_run(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run")


def test_trap_baselines_are_fitted_on_the_images_that_the_run_is_fitted_on(store, run_dir):
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    for fitted in (36, 48):  # train alone, and with the validation images
        result = evaluate(embeddings, store, fitted_images=fitted)
        models = result["models"]
        numbers = {name: row.get("fitted_images") for name, row in models.items()}
        assert {numbers[name] for name in (*FITTED, "multimodal")} == {fitted}
        assert {numbers[name] for name in ("image_only", "text_only", "chance")} == {None}
        table = table_rows(result)
        assert table[0][-1] == "fitted on"
        assert {row[0]: row[-1] for row in table[1:]} == {
            name: "–" if number is None else str(number) for name, number in numbers.items()
        }
    roles = store.roles()
    splits = [store_pairs.read_pairs(store, rows) for rows in (roles.train, roles.selection, roles.report)]
    settings = choose(CCA(Moments.of(standardised(*splits[:2])[0])), standardised(*splits[:2])[1])
    both = store_pairs.read_pairs(store, roles.together().train)
    fitting, measured = standardised(both, splits[2])
    expected = rank(*CCA(Moments.of(fitting)).fit(settings)(measured), measured.image_index)
    assert models["cca"]["settings"] == settings
    assert models["cca"]["rsum"] == pytest.approx(report([expected], draws=0)["rsum"])


def test_a_run_says_itself_how_many_images_it_was_fitted_on(own_store, own_run, fit_config, changed, tmp_path):
    with FeatureStore(own_store) as store:
        fit(store, tmp_path / "again", changed(fit_config, training={"refit": True}))
    for folder, images in ((own_run, 36), (tmp_path / "again", 48)):
        models = workflows.evaluate(folder, store=own_store).result["models"]
        assert {models[name]["fitted_images"] for name in (*FITTED, "multimodal")} == {images}
    assert workflows.evaluate(store=own_store).result["models"]["cca"]["fitted_images"] == 48


def test_ranks_are_kept_beside_the_store_and_used_again(own_store, monkeypatch, told):
    with FeatureStore(own_store) as store:
        first = evaluate(None, store)
        (file,) = own_store.with_name("s.h5.baselines").glob("*.npz")
        content = file.read_bytes()
        measured = []
        monkeypatch.setattr(
            evaluation,
            "measure_baselines",
            lambda *arguments: measured.append(1) or baseline_ranks.measure_baselines(*arguments),
        )
        assert evaluate(None, store) == first
        assert not measured
        assert evaluate(None, store, fresh=True) == first
        assert measured == [1]
        assert file.read_bytes() == content  # the same seed gives the same bytes
        evaluate(None, store, seed=1)
        evaluate(None, store, "dev")
        evaluate(None, store, fitted_images=36)
        assert len(measured) == 4
        monkeypatch.setattr(baseline_cache, "__version__", "another")
        assert evaluate(None, store) == first
        assert len(measured) == 5
    assert told == []


@pytest.mark.parametrize("harm", ["cut", "flip", "other", "text", "outside", "compressed", "shape", "about"])
def test_a_damaged_file_of_ranks_costs_time_alone(measured_store, told, harm):
    with FeatureStore(measured_store) as store:
        first = evaluate(None, store)
        (file,) = measured_store.with_name("s.h5.baselines").glob("*.npz")
        content = file.read_bytes()
        if harm == "other":
            evaluate(None, store, seed=1)
            (other,) = set(file.parent.glob("*.npz")) - {file}
            shutil.copy(other, file)
        elif harm in ("cut", "flip", "text"):
            changed = {"cut": content[:-400], "flip": content[:900] + b"!" + content[901:], "text": b"no ranks"}
            file.write_bytes(changed[harm])
        else:
            arrays = dict(np.load(file))
            arrays["counts_0"][0, 0, 0, 0] = 999 if harm == "outside" else 0
            if harm == "shape":
                arrays["counts_1"] = arrays["counts_1"][..., :3]
            if harm == "about":
                arrays["about"] = np.array('[["cca"]]')
            (np.savez_compressed if harm == "compressed" else np.savez)(file, **arrays)
        harmed = file.read_bytes()
        assert evaluate(None, store) == first
        warned = [message for message in told if "is damaged, and is computed again" in message]
        assert len(warned) == (harm != "other")
        assert told[-1].endswith(f"what it held is kept as {file.name}.1.old")
        assert file.with_name(f"{file.name}.1.old").read_bytes() == harmed
        assert file.read_bytes() == content
        before = len(told)
        assert evaluate(None, store) == first
        assert len(told) == before


HOSTILE = {
    "a run's row": lambda about: about[0].__setitem__(0, "multimodal"),
    "a name to print": lambda about: about[0].__setitem__(0, "\x1b[2Jcca"),
    "no rows": lambda about: about.clear(),
    "a row less": lambda about: about.pop(),
    "a row twice": lambda about: about.__setitem__(1, about[0]),
    "another order": lambda about: about.reverse(),
    "a name that is none": lambda about: about[0].__setitem__(0, None),
    "hubs in a list": lambda about: about[0].__setitem__(1, [1.0]),
    "hubs in words": lambda about: about[0][1].__setitem__("image_to_text", {}),
    "hubs without end": lambda about: about[0][1].__setitem__("image_to_text", 10**400),
    "NaN": lambda about: about[0][2].__setitem__("strength", float("nan")),
    "other images": lambda about: about[0].__setitem__(3, -5),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_trap_a_file_of_ranks_that_somebody_made_gives_no_other_rows(measured_store, told, harm):
    with FeatureStore(measured_store) as store:
        first = evaluate(None, store)
        (file,) = measured_store.with_name("s.h5.baselines").glob("*.npz")
        arrays = dict(np.load(file))
        about = json.loads(str(arrays["about"]))
        HOSTILE[harm](about)
        arrays["about"] = np.array(json.dumps(about))
        np.savez(file, **arrays)
        assert evaluate(None, store) == first
    assert f"{file} is damaged, and is computed again: " in told[0]


@pytest.mark.parametrize(
    "counts", [np.full((1, 2, 2, 60), 2**62), np.ones((1, 2, 2, 60)), np.ones((3, 2, 2, 60), np.int32)]
)
def test_ranks_of_another_type_or_number_are_computed_again(measured_store, told, counts):
    with FeatureStore(measured_store) as store:
        first = evaluate(None, store)
        (file,) = measured_store.with_name("s.h5.baselines").glob("*.npz")
        np.savez(file, **dict(np.load(file)) | {"counts_0": counts})
        assert evaluate(None, store) == first
    assert "is damaged, and is computed again: no ranks of cca" in told[0]


def test_trap_no_file_but_kept_ranks_is_removed_whatever_the_folder_is(own_store, own_run, tmp_path, told):
    folder = own_store.with_name("s.h5.baselines")
    shutil.copytree(own_run, folder)  # a run, with a record of its files
    (tmp_path / "linked").mkdir()
    shutil.copytree(own_run, tmp_path / "linked/run")
    before = {path.name: path.read_bytes() for path in own_run.iterdir() if path.is_file()}
    with FeatureStore(own_store) as store:
        first = evaluate(None, store)
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / "linked/run")
        assert evaluate(None, store) == first
    after = {path.name: path.read_bytes() for path in (tmp_path / "linked/run").iterdir() if path.is_file()}
    assert after == before
    assert told[-1] == f"{folder} is a link, and the baselines are not kept for the next time"


def test_trap_a_runs_files_in_the_folder_of_kept_ranks_stay(own_store, own_run):
    folder = shutil.copytree(own_run, own_store.with_name("s.h5.baselines"))
    with FeatureStore(own_store) as store:
        evaluate(None, store)
    assert read_embeddings(folder / "embeddings.h5").ids
    assert (folder / "heads.safetensors").read_bytes() == (own_run / "heads.safetensors").read_bytes()


@pytest.mark.parametrize("is_dangling", [False, True])
def test_trap_a_link_among_the_kept_ranks_is_not_followed(measured_store, tmp_path, told, is_dangling):
    with FeatureStore(measured_store) as store:
        first = evaluate(None, store)
        (file,) = measured_store.with_name("s.h5.baselines").glob("*.npz")
        file.unlink()
        target = tmp_path / "thesis.txt"
        if not is_dangling:
            target.write_text("mine")
        file.symlink_to(target)
        assert evaluate(None, store) == first
    assert target.exists() is not is_dangling
    if not is_dangling:
        assert target.read_text() == "mine"
    assert told[-1] == f"{file} is not kept for the next time: it is a link"


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_baseline_that_cannot_be_fitted_has_no_row_and_the_others_have(own_store, told, kind, monkeypatch):
    with FeatureStore(own_store) as store:
        features = np.ones_like(store.image_features[:] if kind == "image" else store.text_features[:])
        monkeypatch.setattr(FeatureStore, f"{kind}_features", features)
        result = evaluate(None, store, fresh=True)
        assert evaluate(None, store) == result
    assert list(result["models"]) == ["image_only", "text_only", "chance"]
    assert len([message for message in told if "has no row, since it cannot be fitted: " in message]) == 4


@pytest.mark.parametrize("method", ["locked", "check_origin"])
def test_a_folder_that_cannot_be_written_to_is_no_error(measured_store, told, monkeypatch, method):
    def refused(*_arguments):
        raise PermissionError(13, "Permission denied", str(measured_store))

    with FeatureStore(measured_store) as store:
        first = evaluate(None, store)
        shutil.rmtree(measured_store.with_name("s.h5.baselines"))
        monkeypatch.setattr(f"onceover.base.outputs.Outputs.{method}", refused)
        assert evaluate(None, store) == first
    assert "is not kept for the next time: [Errno 13] Permission denied" in told[0]


def test_a_folder_that_cannot_be_read_is_no_error(measured_store, told, monkeypatch):
    with FeatureStore(measured_store) as store:
        first = evaluate(None, store)

        def refused(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("onceover.base.kept_arrays.read_npz", refused)
        assert evaluate(None, store) == first
    assert "cannot be read, and is computed again: [Errno 13] Permission denied" in told[0]


def test_a_file_in_the_place_of_the_folder_is_no_error_and_stays(own_store, told):
    own_store.with_name("s.h5.baselines").write_text("mine")
    with FeatureStore(own_store) as store:
        first = evaluate(None, store)
        assert evaluate(None, store, fresh=True) == first
    assert own_store.with_name("s.h5.baselines").read_text() == "mine"
    assert any("is not kept for the next time" in message for message in told)


def test_trap_a_strangers_file_among_the_kept_ranks_stays(measured_store, told):
    with FeatureStore(measured_store) as store:
        first = evaluate(None, store)
        folder = measured_store.with_name("s.h5.baselines")
        (file,) = folder.glob("*.npz")
        shutil.rmtree(folder)
        folder.mkdir()
        file.write_bytes(b"mine")
        (folder / "notes.txt").write_text("mine")
        assert evaluate(None, store) == first
    assert file.read_bytes() == b"mine"
    assert (folder / "notes.txt").read_text() == "mine"
    assert any("was not written by this program, and is left as it is" in message for message in told)


def test_ranks_of_features_that_are_gone_or_of_other_versions_are_removed(own_store, run_dir, monkeypatch):
    files = []
    with FeatureStore(own_store) as store:
        for change in ("nothing", "features", "version"):
            if change == "features":
                monkeypatch.setattr(store, "fingerprints", store.fingerprints | {"text": "other"})
            if change == "version":
                monkeypatch.setattr(baseline_cache, "BASELINES_VERSION", 0)
            evaluate(None, store)
            files += own_store.with_name("s.h5.baselines").glob("*.npz")
    assert len(set(files)) == 3


def test_two_evaluations_at_once_agree(own_store):
    results = []

    def work():
        with FeatureStore(own_store) as store:
            results.append(evaluate(None, store))

    workers = [threading.Thread(target=work) for _ in range(3)]
    with threadpool_limits(2, user_api="blas"):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        after = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    assert after == {2}  # whoever began and ended first
    assert results[0] == results[1] == results[2]
    assert len(list(own_store.with_name("s.h5.baselines").glob("*.npz"))) == 1


def test_trap_a_plainer_evaluation_takes_no_rows_away(measured_store, own_run, told):
    first = workflows.evaluate(own_run, store=measured_store, rerank=["csls"], folds=2, shuffled=True).result
    told.clear()
    second = workflows.evaluate(own_run, store=measured_store, rerank=["qbnorm"]).result
    kept = "multimodal_csls_transductive, multimodal_2_folds, shuffled"
    assert f"from an earlier evaluation of the same embeddings: {kept}" in notes(second)
    names = ["multimodal", "multimodal_qbnorm", "multimodal_csls_transductive", "multimodal_2_folds"]
    assert list(second["models"]) == [*names, *FITTED, "image_only", "text_only", "shuffled", "chance"]
    for name, row in first["models"].items():
        assert second["models"][name] == row
    written = read_record(own_run / "evaluation-test.json", "")
    assert list(written["models"]) == list(second["models"])
    assert "multimodal_2_folds" in (own_run / "evaluation-test.md").read_text()
    assert "shuffled: heads fitted" in " ".join(notes(second))


@pytest.mark.parametrize(
    ("name", "row"),
    [("multimodal_x", 1), ("multimodal_x", {}), ("multimodal_x", {"rsum": "9"}), ("multimodal_csls", "x")],
)
def test_rows_that_are_none_are_not_kept(measured_store, own_run, told, name, row):
    first = workflows.evaluate(own_run, store=measured_store).result
    file = own_run / "evaluation-test.json"
    earlier = read_record(file, "")
    earlier["models"][name] = row
    Outputs(own_run, "").write_record(file.name, earlier)
    told.clear()
    assert workflows.evaluate(own_run, store=measured_store).result == first
    assert told[0].startswith(f"{file} is damaged or of another version, and is replaced: ")


def test_two_evaluations_of_a_run_at_once_keep_both_their_rows(measured_store, own_run):
    workflows.evaluate(own_run, store=measured_store)
    options = ({"folds": 2}, {"equal_captions": True}, {"rerank": ["csls"]})
    workers = [
        threading.Thread(target=workflows.evaluate, args=(own_run,), kwargs={"store": measured_store, **own})
        for own in options
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    written = read_record(own_run / "evaluation-test.json", "")["models"]
    assert {"multimodal_2_folds", "multimodal_equal_captions", "multimodal_csls_transductive"} <= set(written)


@pytest.mark.parametrize("key", ["space", "fingerprints"])
def test_rows_of_other_embeddings_are_replaced_and_told(measured_store, own_run, told, key):
    workflows.evaluate(own_run, store=measured_store, rerank=["csls"])
    file = own_run / "evaluation-test.json"
    other = read_record(file, "")
    other[key] = "other"
    Outputs(own_run, "").write_record(file.name, other)
    told.clear()
    result = workflows.evaluate(own_run, store=measured_store).result
    assert "multimodal_csls_transductive" not in result["models"]
    assert told == [f"{file} is of other embeddings and is replaced, with its rows multimodal_csls_transductive"]


def expected_with_equal(images, texts, image_index, captions):
    """Hits at 1 when equal captions are correct as well, by explicit loops; without ties between different captions."""
    scores = images @ texts.T
    to_text = []
    for row in np.unique(image_index):
        own = {captions[caption] for caption in np.flatnonzero(image_index == row)}
        to_text.append(captions[int(scores[row].argmax())] in own)
    to_image = []
    for caption in range(len(texts)):
        correct = {int(image_index[other]) for other in range(len(texts)) if captions[other] == captions[caption]}
        to_image.append(int(scores[:, caption].argmax()) in correct)
    return np.array(to_text, float), np.array(to_image, float)


@pytest.mark.parametrize("noise", [0, 1e-7])  # a text encoder pads by batch, and rounds by that
def test_equal_captions_of_other_images_are_correct_as_an_explicit_loop_counts_them(noise):
    generator = np.random.default_rng(0)
    image_index = np.sort(np.r_[np.arange(30), generator.integers(30, size=50)])
    captions = [f"caption {number}" for number in generator.integers(25, size=80)]
    vector_of = {caption: generator.standard_normal(6) for caption in sorted(set(captions))}
    texts = np.stack([vector_of[caption] for caption in captions])
    images = generator.standard_normal((30, 6))
    rounded = texts + noise * generator.standard_normal(texts.shape)
    pair = rank_equal_captions(images, rounded, image_index, captions, {})
    for ranks, hits in zip(pair, expected_with_equal(images, texts, image_index, captions), strict=True):
        np.testing.assert_allclose(ranks.hit_at(1), hits)
    plain = rank(images, texts, image_index)
    for ranks, before in zip(pair, plain, strict=True):
        assert (ranks.hit_at(5) >= before.hit_at(5) - 1e-12).all()
        np.testing.assert_array_equal(ranks.group, before.group)


def test_without_equal_captions_nothing_changes():
    generator = np.random.default_rng(0)
    index = np.repeat(np.arange(12), 2)
    vectors = (generator.standard_normal((12, 4)), generator.standard_normal((24, 4)), index)
    biases = {"image_bias": generator.standard_normal(12), "text_bias": generator.standard_normal(24)}
    pair = rank_equal_captions(*vectors, [str(number) for number in range(24)], biases)
    assert report([pair], draws=50) == report([rank(*vectors, **biases)], draws=50)


def test_trap_biases_of_equal_captions_that_differ_in_the_last_bits_make_none_of_them_wrong():
    generator = np.random.default_rng(0)
    label = np.repeat(np.arange(300), 5)
    space = generator.standard_normal((300, 64)).astype(np.float32)
    space /= np.linalg.norm(space, axis=1, keepdims=True)
    images = space[label]
    bank = generator.standard_normal((400, 64)).astype(np.float32) / 8
    bias = inverted_softmax_bias(space[label], bank, 20.0) + np.float32(1e-7) * generator.standard_normal(1500)
    captions = [f"caption {number}" for number in label]
    to_text, to_image = rank_equal_captions(images, space[label], np.arange(1500), captions, {"text_bias": bias})
    np.testing.assert_array_equal(to_image.hit_at(1), 1)
    best = (space @ space.T + bias[::5]).argmax(1) == np.arange(300)  # what a search of different captions finds
    np.testing.assert_array_equal(to_text.hit_at(1), best[label])


def test_all_captions_equal_make_everything_correct():
    index = np.repeat(np.arange(5), 3)
    pair = rank_equal_captions(np.eye(5), np.ones((15, 5)), index, ["a dog"] * 15, {})
    for ranks in pair:
        assert isinstance(ranks, Ranks)
        np.testing.assert_array_equal(ranks.hit_at(1), 1)


def test_folds_are_searches_in_galleries_of_their_own():
    generator = np.random.default_rng(0)
    images = generator.standard_normal((25, 6))
    index = np.sort(generator.integers(25, size=60))
    texts = generator.standard_normal((60, 6)) + images[index]
    biases = {"image_bias": generator.standard_normal(25), "text_bias": generator.standard_normal(60)}
    to_text, to_image = rank_folds(images, texts, index, 5, biases)
    hits = []
    for start in range(0, 25, 5):
        captions = (index >= start) & (index < start + 5)
        own = {"image_bias": biases["image_bias"][start : start + 5], "text_bias": biases["text_bias"][captions]}
        hits.append(rank(images[start : start + 5], texts[captions], index[captions] - start, **own))
    np.testing.assert_array_equal(to_text.hit_at(1), np.concatenate([pair[0].hit_at(1) for pair in hits]))
    np.testing.assert_array_equal(to_image.hit_at(3), np.concatenate([pair[1].hit_at(3) for pair in hits]))
    np.testing.assert_array_equal(to_image.group, index)
    np.testing.assert_array_equal(to_text.group, np.unique(index))
    assert to_image.gallery == 5


def test_the_rows_of_other_ways_to_count_are_labelled(run, fails, own_run, own_store):
    said = run("evaluate", "--run", own_run, "--store", own_store, "--equal-captions", "--folds", 3)
    table = (own_run / "evaluation-test.md").read_text(encoding="utf-8")
    assert "| multimodal_3_folds | caption → image (4) |" in table  # twelve images
    assert "| multimodal_equal_captions | caption → image (12) |" in table
    assert "each query searches its own fold alone" in said.stderr
    result = json.loads((own_run / "evaluation-test.json").read_text())
    assert result["models"]["multimodal_3_folds"]["text_to_image"]["queries"] == 60
    for folds in (13, 10**12):
        assert fails("evaluate", "--run", own_run, "--store", own_store, "--folds", folds) == (
            f"12 images do not make {folds} folds; take fewer folds"
        )
    with pytest.raises(EvaluationError, match="1 folds are no smaller galleries; take 2 or more"):
        workflows.evaluate(own_run, store=own_store, folds=1)
    assert "name a --run" in run("evaluate", "--store", own_store, "--folds", 5, code=2).stderr


def test_few_different_captions_are_told(store, run_dir):
    result = evaluate(None, store)
    assert result["n_different_captions"] == len({store.captions[row] for row in np.flatnonzero(
        np.isin(store.image_index, store.roles().report))})  # fmt: skip
    assert not any("captions are different" in note for note in notes(result))
    note = notes(result | {"n_different_captions": 9})[-1]
    assert note.startswith("only 9 of the 60 captions are different, and an equal caption of another image counts as")


def test_an_evaluation_computes_in_threads_of_its_own_alone(store, monkeypatch):
    seen = []
    real = baseline_ranks._fit_and_measure

    def looking(*arguments):
        seen.append({library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"})
        return real(*arguments)

    monkeypatch.setattr(baseline_ranks, "_fit_and_measure", looking)
    with threadpool_limits(2, user_api="blas"):
        evaluate(None, store, fresh=True)
        after = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    assert seen == [{1}] * 4
    assert after == {2}


def test_a_failing_task_ends_the_others(monkeypatch):
    monkeypatch.setattr(threads, "available_cpus", lambda: 2)
    failed = threading.Event()
    begun = []

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), worker_threads() as pool:
        failing = pool.submit(fail)
        pool.submit(failed.wait, 60)
        pool.submit(failed.wait, 60)  # both threads are at work
        last = pool.submit(begun.append, 1)
        try:
            failing.result()
        finally:
            last.cancel()
            failed.set()
    assert begun == []


def test_an_interrupted_evaluation_ends_with_the_candidates_it_is_at(store, monkeypatch):
    seen = []
    real = baseline_ranks.choose

    def choose(family, validation, step):
        def interrupting():
            seen.append(threading.get_ident())
            if len(seen) > 4:
                time.sleep(0.2)  # until the main thread has noticed
            step()

        return real(family, validation, interrupting)

    monkeypatch.setattr(baseline_ranks, "choose", choose)
    monkeypatch.setattr(threads, "available_cpus", lambda: 1)

    def interrupt():
        if len(seen) > 3:
            raise KeyboardInterrupt

    rows = store_pairs.fitting_rows(store, store.roles(), 12, 2**34, True)
    with pytest.raises(KeyboardInterrupt):
        baseline_ranks.measure_baselines(store, store.roles().report, rows, step=interrupt)
    assert len(seen) < 30  # of some two hundred


def test_trap_baselines_are_not_fitted_on_the_images_that_are_measured(store):
    roles = store.roles()
    result = evaluate(None, store, roles.selection_name)
    assert {result["models"][name]["fitted_images"] for name in FITTED} == {len(roles.train)}
    result = evaluate(None, store, roles.report_name)
    assert {result["models"][name]["fitted_images"] for name in FITTED} == {len(roles.together().train)}


@pytest.mark.parametrize(
    "options", [{"rerank": ["csls"]}, {"folds": 2}, {"equal_captions": True}], ids=["rerank", "folds", "equal"]
)
def test_rows_of_a_run_need_a_run(store, options):
    with pytest.raises(EvaluationError, match="there is no run whose rows could be added"):
        evaluate(None, store, **options)


def test_a_sanity_check_needs_a_run(own_store):
    with pytest.raises(workflows.WorkflowError, match="no run whose sanity check could be fitted"):
        workflows.evaluate(store=own_store, shuffled=True)


def test_an_evaluation_of_an_earlier_version_keeps_its_rows(own_store, own_run, told):
    workflows.evaluate(own_run, store=own_store, rerank=["csls"])
    file = own_run / "evaluation-test.json"
    earlier = read_record(file, "")
    del earlier["fingerprints"]
    Outputs(own_run, "").write_record(file.name, earlier)
    told.clear()
    result = workflows.evaluate(own_run, store=own_store).result
    assert "multimodal_csls_transductive" in result["models"]
    assert result["kept_rows"] == ["multimodal_csls_transductive"]
    assert told == []


@pytest.mark.parametrize(
    ("quota", "cpus"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("broken", 64), (None, 64)]
)
def test_a_containers_quota_bounds_the_threads(monkeypatch, tmp_path, quota, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(64)))
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_QUOTA_V1", (tmp_path / "quota", tmp_path / "period"))
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert available_cpus() == cpus
    for variable in threads._VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    bound_threads()
    if cpus < 64:
        assert os.environ["OMP_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == str(cpus)
    else:
        assert "OPENBLAS_NUM_THREADS" not in os.environ
    assert os.environ["MKL_NUM_THREADS"] == "7"


def test_the_limit_of_openmp_bounds_the_threads_as_well(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(64)))
    for variable in threads._VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "3")
    assert available_cpus() == 3
    bound_threads()  # faiss would wait for ever for the others
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_an_older_containers_quota_is_read_as_well(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(64)))
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_QUOTA_V1", (tmp_path / "quota", tmp_path / "period"))
    (tmp_path / "period").write_text("100000\n")
    for quota, cpus in (("300000", 3), ("-1", 64)):
        (tmp_path / "quota").write_text(f"{quota}\n")
        assert available_cpus() == cpus


def test_torch_has_no_more_threads_than_processors(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr("onceover.extract.encoding.devices.available_cpus", lambda: 1)
        pick_device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
