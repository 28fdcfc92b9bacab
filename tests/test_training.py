"""Heads, batches and the fit: standardising, exact resume, honest selection, and the mistakes of peers."""

import contextlib
import dataclasses
import itertools
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onceover.analysis.describe import describe, run_settings
from onceover.base.errors import OnceoverError
from onceover.base.hdf5 import sign_hdf5
from onceover.base.outputs import Outputs
from onceover.configs.schema import Config, ModelConfig, TrainingConfig
from onceover.extract.store import FeatureStore
from onceover.heads import chunks, replacement, stacking, training
from onceover.heads import closed_form as closed_form_module
from onceover.heads.batches import Batches
from onceover.heads.checkpoint import RunError, load_run, save_resume
from onceover.heads.closed_form import CCA_SHARE, chosen_share
from onceover.heads.embed import EmbedError, embed, image_embeddings
from onceover.heads.ensemble import ensemble
from onceover.heads.losses import contrastive
from onceover.heads.models import DualHeads, Ensemble, Standardize, unit
from onceover.heads.schedule import learning_rate, scheduled
from onceover.heads.seeds import seed_for
from onceover.heads.training import TrainingError
from onceover.heads.training_data import TrainingData, shuffle_pairs
from onceover.heads.trials import trial_memory
from onceover.retrieval.baselines import Pairs
from onceover.retrieval.closed_form import CCA, Moments
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.hubness import fit_inverted_softmax, inherited_betas
from onceover.retrieval.metrics import quality as measure
from onceover.retrieval.metrics import separation
from onceover.retrieval.ranks import rank


def fit(*arguments, quality=measure, **options):
    """Fits heads, which ``quality`` measures in the place of the real measure."""
    with patch.object(training, "quality", quality):
        return training.fit(*arguments, **options)


@pytest.fixture(autouse=True)
def saved_at_every_look(monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)


def outputs(folder):
    """What a fit makes, times aside: heads, embeddings, history."""
    history = [line.rpartition(",")[0] for line in (folder / "history.csv").read_text().splitlines()]
    with h5py.File(folder / "embeddings.h5", locking=False) as file:  # as the program opens it
        arrays = {
            name: file[name][:].tobytes() for name in ("image/embedding", "text/embedding", "image/bias", "text/bias")
        }
    return (folder / "heads.safetensors").read_bytes(), arrays, history


@pytest.mark.parametrize(
    ("images", "size", "epochs"),
    [
        (2, 64, 30),
        (100, 64, 30),
        (250, 64, 30),
        (480, 64, 15),
        (600, 75, 15),
        (1000, 125, 15),
        (2000, 250, 22),
        (4000, 256, 30),
        (10**6, 256, 30),
    ],
)
def test_batches_and_epochs_follow_the_number_of_train_images(images, size, epochs):
    training = scheduled(Config(), images).training
    assert (training.images_per_step, training.epochs) == (size, epochs)
    named = Config(training=TrainingConfig(num_epochs=7, batch_size=9))
    assert scheduled(named, images) == named
    assert scheduled(Config(training=TrainingConfig(batch_size=256)), 250).training.epochs == 30  # of a step each


def test_a_fit_without_a_number_of_epochs_chooses_one_and_goes_on_with_it(store_file, fit_config, tmp_path):
    chosen = dataclasses.replace(fit_config.training, num_epochs=None, batch_size=18, patience=0)
    config = dataclasses.replace(fit_config, training=chosen)
    with FeatureStore(store_file) as store:
        assert len(store.roles().train) == 36
        made = fit(store, tmp_path / "run", config)
        assert made["epochs"] == [30]
        assert made["schedule"] == {"num_epochs": 30, "batch_size": 18}
        assert ", num_epochs 30, batch_size 18, " in describe(tmp_path / "run")
        assert run_settings(tmp_path / "run", made)["training"]["batch_size"] == 18  # as a report shows it
        named = dataclasses.replace(config, training=dataclasses.replace(chosen, num_epochs=30))
        fit(store, tmp_path / "named", named)
        assert outputs(tmp_path / "run") == outputs(tmp_path / "named")
        for same in (config, named):
            assert fit(store, tmp_path / "run", same) == made  # it is finished


def test_standardising_gives_mean_0_and_deviation_1_over_train_and_0_for_a_constant():
    features = torch.randn(500, 2, 6) * torch.tensor([1e-3, 1, 50, 1, 1, 1]) + 7
    features[..., 3] = 0.1234567
    layer = Standardize(6)
    layer.fit(lambda: features.split(7))
    assert not layer.root
    out = layer(features).reshape(-1, 6)
    moving = [0, 1, 2, 4, 5]
    np.testing.assert_allclose(out.mean(0), 0, atol=2e-2)
    np.testing.assert_allclose(out[:, moving].std(0), 1, rtol=1e-2)
    assert out[:, 3].abs().max() == 0


def test_features_that_are_never_negative_are_square_rooted_first():
    features = torch.rand(200, 3) ** 4
    layer = Standardize(3)
    layer.fit(lambda: features.split(7))
    rooted = features.sqrt()
    torch.testing.assert_close(
        layer(features), (rooted - rooted.mean(0)) / rooted.std(0, correction=0), rtol=1e-4, atol=1e-5
    )
    assert torch.isfinite(layer(-features)).all()


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_embeddings_are_unit_vectors_and_a_picture_is_the_mean_of_its_views(head):
    heads = DualHeads(6, 5, ModelConfig(head=head, embedding_dim=4)).eval()
    views = torch.randn(7, 3, 6)
    apart = torch.stack([heads.embed_views(views[:, view]) for view in range(3)])
    np.testing.assert_allclose(apart.norm(dim=-1).detach(), 1, rtol=1e-5)
    mean = apart.mean(0)
    torch.testing.assert_close(heads.embed_images(views), mean / mean.norm(dim=-1, keepdim=True))
    assert heads.embed_texts(torch.randn(2, 5)).shape == (2, 4)


def test_unit_vectors_and_their_gradient():
    vectors = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(unit(vectors), torch.nn.functional.normalize(vectors, dim=-1))
    assert torch.autograd.gradcheck(unit, vectors)
    assert unit(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_trap_an_embedding_without_direction_is_an_error_not_a_division_by_zero():
    heads = DualHeads(3, 3, ModelConfig(embedding_dim=2, dropout=0)).eval()
    with torch.no_grad():
        for parameter in heads.image.parameters():
            parameter.zero_()
    with pytest.raises(EmbedError, match="4 image embeddings are not unit vectors"):
        image_embeddings(heads, np.zeros((4, 1, 3), np.float32) + 1)


def test_trap_a_learned_temperature_is_clamped_and_a_fixed_one_stays():
    stacked = torch.tensor([1e-6, 50.0, 0.2]).log().requires_grad_()
    DualHeads(3, 3, ModelConfig()).clamp_scalars({"log_temperature": stacked})
    torch.testing.assert_close(stacked.detach().exp(), torch.tensor([0.01, 1.0, 0.2]))
    fixed = torch.tensor([1e-6]).log()
    heads = DualHeads(3, 3, ModelConfig(learn_temperature=False))
    heads.clamp_scalars({"log_temperature": fixed})
    assert float(fixed.exp()) == pytest.approx(1e-6)
    assert not heads.log_temperature.requires_grad


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 30), st.integers(2, 5), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_an_epoch_passes_every_caption_once_and_a_batch_every_picture_at_most_once(seed, n, m, size, each):
    generator = np.random.default_rng(seed)
    index = np.r_[0, generator.integers(n, size=m)]  # uneven, unsorted, some images without captions
    pictures = np.unique(np.r_[0, generator.permutation(n)[: n // 2 + 1]])
    batches = Batches(pictures, index, 3, size, each)
    seen, steps = [], 0
    for chosen, views, captions, place in batches.epoch(np.random.default_rng(seed)):
        steps += 1
        assert len(chosen) == len(views) <= size
        assert len(set(chosen.tolist())) == len(chosen)
        assert set(views.tolist()) <= {0, 1, 2}
        assert chosen[place].tolist() == index[captions].tolist()
        assert np.bincount(place, minlength=len(chosen)).min() >= 1
        assert np.bincount(place).max() <= each
        seen += captions.tolist()
    assert sorted(seen) == np.flatnonzero(np.isin(index, pictures)).tolist()
    assert steps == batches.steps


def test_views_and_captions_are_drawn_at_random_and_anew_each_epoch():
    batches = Batches(np.arange(50), np.repeat(np.arange(50), 5), 2, batch_size=50, captions_per_image=1)
    first, second = (list(batches.epoch(np.random.default_rng(seed_for(0, "order", epoch)))) for epoch in (0, 1))
    assert len(first) == 5
    assert sum(part[1].sum() for part in first) == pytest.approx(125, abs=40)
    assert [part[2].tolist() for part in first] != [part[2].tolist() for part in second]


def test_seeds_differ_by_purpose_and_epoch_and_never_otherwise():
    seeds = {
        seed_for(seed, purpose, epoch)
        for seed in (0, 1)
        for purpose in ("initialisation", "order", "noise")
        for epoch in (0, 1)
    }
    assert len(seeds) == 12
    assert seed_for(0, "order", 3) == seed_for(0, "order", 3)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainingConfig(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[100] == pytest.approx(0)


def test_the_loss_falls_and_the_model_finds_what_it_was_shown(run_dir):
    rows = (run_dir / "history.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,loss,learning_rate,temperature,rsum,image_to_text_R@1")
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert losses[-1] < losses[0]
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    pictures, captions, index = embeddings.split("train")
    found = measure(embeddings.images[pictures], embeddings.texts[captions], index)
    assert found["text_to_image"]["R@5"] > 2 * 100 * 5 / 36


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_same_seed_same_result_to_the_bit_and_another_seed_another(store, tmp_path, fit_config, changed, head):
    config = changed(fit_config, model={"head": head, "dropout": 0.3})
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # what the caller did with the global generator does not matter
        fit(store, tmp_path / name, config)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    fit(store, tmp_path / "c", changed(config, training={"seed": 1}))
    assert outputs(tmp_path / "c")[0] != outputs(tmp_path / "a")[0]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_trap_an_interrupted_fit_resumes_to_the_same_result_bit_for_bit(
    store, tmp_path, fit_config, changed, epoch, messages
):
    config = changed(
        fit_config, model={"head": "mlp", "dropout": 0.3}, training={"num_epochs": 5, "patience": 3, "check_every": 1}
    )
    fit(store, tmp_path / "whole", config)
    calls = []

    def interrupted(*arrays):
        calls.append(1)
        if len(calls) > epoch:
            raise KeyboardInterrupt
        return measure(*arrays)

    with pytest.raises(KeyboardInterrupt):
        fit(store, tmp_path / "resumed", config, quality=interrupted)
    with pytest.raises(RunError, match="was interrupted; run the same fit command again"):
        load_run(tmp_path / "resumed")
    fit(store, tmp_path / "resumed", config)
    assert f"going on after epoch {epoch}" in messages
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "resume.pt").exists()


def test_an_interrupted_fit_of_other_settings_is_not_gone_on_with(store, tmp_path, fit_config, changed):
    def interrupted(*_arrays):
        raise KeyboardInterrupt

    counted = iter(range(9))

    def second(*arrays):
        return measure(*arrays) if next(counted) < 1 else interrupted()

    with pytest.raises(KeyboardInterrupt):
        fit(store, tmp_path / "r", fit_config, quality=second)
    other = changed(fit_config, training={"learning_rate": 0.5})
    with pytest.raises(RunError, match="interrupted fit of other settings"):
        fit(store, tmp_path / "r", other)
    (tmp_path / "r" / "resume.pt").write_bytes(b"nonsense")
    with pytest.raises(RunError, match="cannot be read .File is not a zip file.; fit again with --force"):
        fit(store, tmp_path / "r", fit_config)
    assert fit(store, tmp_path / "r", other, force=True)["epochs"][0] >= 1


def test_trap_a_resume_state_is_never_unpickled(store, tmp_path, fit_config):
    import pickle

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "r").mkdir()
    replacement.run_files(tmp_path / "r").write_bytes("resume.pt", pickle.dumps(Evil()))
    with pytest.raises(RunError, match="cannot be read"):
        fit(store, tmp_path / "r", fit_config)
    assert not (tmp_path / "ran").exists()


def test_a_finished_run_is_kept_and_another_is_refused_in_its_place(
    store, run_dir, tmp_path, fit_config, changed, messages
):
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    before = outputs(folder)
    fit(store, folder, fit_config)
    assert "is fitted with these settings on this store already" in messages[0]
    with pytest.raises(RunError, match="holds a run of other settings"):
        fit(store, folder, changed(fit_config, training={"seed": 9}))
    assert outputs(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is not empty and no run"):
        fit(store, tmp_path / "mine", fit_config)


def test_trap_the_model_is_chosen_without_a_look_at_the_reported_split(store_file, tmp_path, fit_config):
    """Whatever stands in the test split, the heads come out the same."""
    poisoned = shutil.copy(store_file, tmp_path / "s.h5")
    with h5py.File(poisoned, "r+") as file:
        test = np.flatnonzero(file["image/split"].asstr()[:] == "test")
        captions = np.flatnonzero(np.isin(file["text/image_index"][:], test))
        file["image/features"][test] = np.random.default_rng(0).random(
            (len(test), *file["image/features"].shape[1:]), np.float32
        )
        file["text/features"][captions] = np.full((len(captions), 32), 0.5, np.float32)
    sign_hdf5(poisoned, ("image/features", "text/features"))
    seen = []

    def quality(images, texts, index):
        seen.append((len(images), len(texts)))
        return measure(images, texts, index)

    for name, path in (("clean", store_file), ("poisoned", poisoned)):
        with FeatureStore(path) as store:
            fit(store, tmp_path / name, fit_config, quality=quality)
    assert set(seen) == {(12, 60)}  # dev
    assert outputs(tmp_path / "clean")[0] == outputs(tmp_path / "poisoned")[0]


@pytest.mark.parametrize(
    ("without", "expected"),
    [(0, []), (2, ["images in no split, which take no part in the fit and can be searched: 2"])],
)
def test_a_fit_counts_the_images_in_no_split(without, expected, store_file, tmp_path, fit_config, changed, told):
    path = shutil.copy(store_file, tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        splits = file["image/split"]
        for row in np.flatnonzero(splits.asstr()[:] == "train")[:without]:
            splits[row] = ""
    sign_hdf5(path, ["image/split"])
    with FeatureStore(path) as store:
        fit(store, tmp_path / "run", changed(fit_config, training={"num_epochs": 1}))
    assert [line for line in told if "no split" in line] == expected


def test_trap_dropout_is_on_in_every_epoch_and_off_in_embeddings(store, tmp_path, fit_config, changed, monkeypatch):
    left_out = []
    real = stacking.Stack.losses

    def watched(self, images, texts, *rest):
        left_out.append(float((images == 0).sum() + (texts == 0).sum()) / (images.numel() + texts.numel()))
        return real(self, images, texts, *rest)

    monkeypatch.setattr(stacking.Stack, "losses", watched)
    fit(store, tmp_path / "r", changed(fit_config, model={"dropout": 0.4}))
    assert 0.35 < min(left_out) < max(left_out) < 0.45  # evaluating between epochs does not leave it off
    heads = load_run(tmp_path / "r").heads
    once, again = (image_embeddings(heads, store.image_features) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_allclose(once, read_embeddings(tmp_path / "r" / "embeddings.h5").images, atol=1e-6)


def test_the_best_epoch_is_kept_and_patience_ends_the_fit(store, tmp_path, fit_config, changed):
    scores = iter([1.0, 5.0, 2.0, 3.0, 4.0, 6.0])

    def quality(*arrays):
        return measure(*arrays) | {"rsum": next(scores)}

    made = fit(
        store,
        tmp_path / "r",
        changed(fit_config, training={"num_epochs": 6, "patience": 2, "check_every": 1}),
        quality=quality,
    )
    assert (made["best_epochs"], made["epochs"], made["selection"]["rsum"]) == ([2], [4], 5.0)


def test_a_loss_that_is_not_finite_stops_with_advice(store, tmp_path, fit_config, monkeypatch):
    monkeypatch.setattr(
        contrastive,
        "loss",
        lambda images, texts, _, scalars: (images.sum((1, 2)) + texts.sum((1, 2))) * float("nan"),
    )
    with pytest.raises(TrainingError, match="not finite in epoch 1; lower training.learning_rate"):
        fit(store, tmp_path / "r", fit_config)
    assert not (tmp_path / "r" / "run.json").exists()


def test_the_run_holds_what_it_promises_and_fingerprints_travel(run_dir, store):
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "heads.safetensors", "history.csv", "embeddings.h5", "run.json", "tokenizer"} <= names
    run = load_run(run_dir)
    assert isinstance(run.config, Config)
    assert run.provenance["fingerprints"] == store.fingerprints
    assert (run.provenance["selection"]["split"], run.provenance["report"]["split"]) == ("dev", "test")
    embeddings = read_embeddings(run_dir / "embeddings.h5")
    assert embeddings.fingerprints == store.fingerprints
    assert (embeddings.ids, embeddings.captions) == (store.image_ids, store.captions)
    np.testing.assert_array_equal(embeddings.image_index, store.image_index)
    run.check_encoder("image", store.recipes["image"])
    with pytest.raises(RunError, match=r"the image encoder is not the one .* \(they differ in: weights\)"):
        run.check_encoder("image", store.recipes["image"] | {"weights": "other"})


def test_damaged_runs_are_named(run_dir, tmp_path):
    with pytest.raises(RunError, match="is no run folder; make one"):
        load_run(tmp_path / "none")
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    (folder / "heads.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(RunError, match="heads.safetensors is damaged, or was changed since the fit; restore it"):
        load_run(folder)


def test_trap_force_never_removes_what_is_not_a_runs_own(store, run_dir, tmp_path, fit_config):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("mine: 1")
    (foreign / "thesis.txt").write_text("years")
    for force in (False, True):
        with pytest.raises(RunError, match="is not empty and no run; name a new folder"):
            fit(store, foreign, fit_config, force=force)
    assert {path.name for path in foreign.iterdir()} == {"config.yaml", "thesis.txt"}
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    (folder / "notes.txt").write_text("keep")
    Outputs(folder, "").write_text("evaluation-test.md", "old")
    (folder / "evaluation-mine.md").write_text("mine")
    (folder / "tokenizer/mine.txt").write_text("mine")
    (folder / "shuffled").mkdir()
    (folder / "shuffled/notes.txt").write_text("mine")
    fit(store, folder, fit_config, force=True)
    assert (folder / "notes.txt").read_text() == "keep"
    assert (folder / "evaluation-mine.md").read_text() == "mine"
    assert (folder / "tokenizer/mine.txt").read_text() == "mine"
    assert not (folder / "evaluation-test.md").exists()
    assert (folder / "shuffled/notes.txt").read_text() == "mine"
    assert outputs(folder) == outputs(run_dir)


def test_trap_force_leaves_the_old_run_until_the_new_one_is_there(store, run_dir, tmp_path, fit_config, changed):
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    diverging = changed(fit_config, training={"learning_rate": 1e30})
    with pytest.raises(OnceoverError, match="not finite|not unit vectors"):
        fit(store, folder, diverging, force=True)
    assert outputs(folder) == outputs(run_dir)
    assert load_run(folder).provenance == load_run(run_dir).provenance


@pytest.mark.parametrize("steps", range(0, 30, 3))
def test_trap_a_replacement_that_was_killed_is_ended_by_the_next_command(
    store, run_dir, tmp_path, fit_config, changed, monkeypatch, steps
):
    """Killed before each step in which files of a forced fit take the place of the old ones."""
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    (folder / "index").mkdir()
    (folder / "store.h5").write_text("of fine-tuning")
    config = changed(fit_config, training={"seed": 5, "num_epochs": 3})
    fit(store, tmp_path / "new", config)
    take_over, left = replacement.take_over, [None]

    def killed(name):
        def step(*arguments, **options):
            if left[0] is not None:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
            return name(*arguments, **options)

        return step

    def begin(work, target):
        left[0] = steps
        take_over(work, target)

    with monkeypatch.context() as patched:
        patched.setattr(replacement, "take_over", begin)
        patched.setattr(os, "replace", killed(os.replace))
        patched.setattr(Path, "unlink", killed(Path.unlink))
        with contextlib.suppress(KeyboardInterrupt):
            fit(store, folder, config, force=True)
    left[0] = None
    if steps == 0:
        fit(store, folder, config, force=True)
    assert load_run(folder).provenance["request"] == load_run(tmp_path / "new").provenance["request"]
    assert outputs(folder) == outputs(tmp_path / "new")
    assert (folder / "index").exists()
    assert (folder / "store.h5").exists()
    hidden = {file.name for file in folder.iterdir() if file.name.startswith(".")}
    assert hidden <= {".onceover.json", ".outputs.lock"}


def test_trap_strangers_folders_within_a_run_are_left_alone(store, run_dir, tmp_path, fit_config):
    for name in (".next", ".swap"):
        folder = tmp_path / f"r{name}"
        shutil.copytree(run_dir, folder)
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("years")
        assert load_run(folder)
        with pytest.raises(RunError, match="is where a run is replaced, and holds something else; move it elsewhere"):
            fit(store, folder, fit_config, force=True)
        assert (folder / name / "thesis.txt").read_text() == "years"
        assert outputs(folder) == outputs(run_dir)


def test_a_forced_fit_goes_on_where_it_was_interrupted(
    store, run_dir, tmp_path, fit_config, changed, monkeypatch, messages
):
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    config = changed(fit_config, training={"seed": 5})
    fit(store, tmp_path / "new", config)
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    counted = iter(range(9))

    def interrupted(*arrays):
        if next(counted) == 2:
            raise KeyboardInterrupt
        return measure(*arrays)

    with pytest.raises(KeyboardInterrupt):
        fit(store, folder, config, quality=interrupted, force=True)
    assert outputs(folder) == outputs(run_dir)
    messages.clear()
    fit(store, folder, config, force=True)
    assert any(line.startswith("going on after epoch") for line in messages)
    assert outputs(folder) == outputs(tmp_path / "new")


def test_trap_what_a_run_is_read_from_is_what_was_written(run_dir, tmp_path):
    """A bit is flipped in each of the run's files; nothing but an error of one line may come of it."""
    names = ["run.json", "config.yaml", "heads.safetensors", "history.csv", "tokenizer/tokenizer.json"]
    generator = np.random.default_rng(0)
    for name in names:
        data = bytearray((run_dir / name).read_bytes())
        for place in generator.integers(len(data), size=12):
            folder = tmp_path / "r"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(run_dir, folder)
            damaged = bytes(data[:place]) + bytes([data[place] ^ 0x10]) + bytes(data[place + 1 :])
            (folder / name).write_bytes(damaged)
            with pytest.raises(OnceoverError) as error:
                _ = load_run(folder).tokenizer_files
            assert "\n" not in str(error.value)


def test_a_run_whose_folder_is_removed_while_it_is_fitted_is_not_called_finished(store, tmp_path, fit_config):
    folder = tmp_path / "r"

    def measured(*arrays):
        shutil.rmtree(folder, ignore_errors=True)
        return measure(*arrays)

    with pytest.raises(RunError, match="config.yaml was removed while the run was being written; fit again"):
        fit(store, folder, fit_config, quality=measured)


def test_trap_the_shuffled_control_swaps_every_train_picture_s_captions_and_no_others(store):
    roles = store.roles()
    swapped = shuffle_pairs(store.image_index, roles.train, 0)
    train = np.isin(store.image_index, roles.train)
    np.testing.assert_array_equal(swapped[~train], store.image_index[~train])
    assert (swapped[train] != store.image_index[train]).all()
    assert sorted(swapped[train]) == sorted(store.image_index[train])
    for picture in roles.train:  # an image's captions stay together
        assert len(np.unique(swapped[store.image_index == picture])) == 1


def test_an_ensemble_averages_its_members_scores_and_is_a_run_like_any_other(
    store, run_dir, tmp_path, fit_config, changed
):
    fit(store, tmp_path / "b", changed(fit_config, model={"embedding_dim": 24}, training={"seed": 5}))
    runs = [load_run(run_dir), load_run(tmp_path / "b")]
    made = ensemble(store, runs, tmp_path / "both")
    folders = run_dir, tmp_path / "b", tmp_path / "both"
    one, two, both = (read_embeddings(folder / "embeddings.h5") for folder in folders)
    assert both.images.shape == (60, 16 + 24)
    mean = (one.images @ one.texts.T + two.images @ two.texts.T) / 2
    np.testing.assert_allclose(both.images @ both.texts.T, mean, atol=1e-6)
    joined = load_run(tmp_path / "both")
    assert isinstance(joined.heads, Ensemble)
    again = image_embeddings(joined.heads, store.image_features)
    np.testing.assert_array_equal(again, both.images)
    pictures, captions, index = both.split("dev")
    assert made["selection"]["rsum"] == measure(both.images[pictures], both.texts[captions], index)["rsum"]
    assert len(ensemble(store, [joined, runs[0]], tmp_path / "three")["members"]) == 3
    (tmp_path / "both/run.json").unlink()
    save_resume(tmp_path / "both", {"request": made["request"]})  # as after a kill
    assert ensemble(store, runs, tmp_path / "both")["space"] == made["space"]
    with pytest.raises(RunError, match="at least two runs"):
        ensemble(store, runs[:1], tmp_path / "c")
    with pytest.raises(RunError, match="both holds a run; name a new folder"):
        ensemble(store, runs, tmp_path / "both")
    runs[1].provenance["fingerprints"]["image"] = "other"
    with pytest.raises(RunError, match="was not fitted on the features of"):
        ensemble(store, runs, tmp_path / "c")


def test_members_are_trained_together_and_resume(store, tmp_path, fit_config, changed, monkeypatch, messages):
    config = changed(fit_config, training={"members": 3, "num_epochs": 4, "check_every": 2})
    stacks, checks, work = [], [], training.train_epochs

    def counted(trials, *rest):
        stacks.append([trial.seed for trial in trials])
        work(trials, *rest)

    def interrupted(*arrays):
        checks.append(1)
        if len(checks) == 5:
            raise KeyboardInterrupt
        return measure(*arrays)

    monkeypatch.setattr(training, "train_epochs", counted)
    with pytest.raises(KeyboardInterrupt):
        fit(store, tmp_path / "many", config, quality=interrupted)
    made = fit(store, tmp_path / "many", config)
    assert "going on after epoch 2" in messages  # the last check that was finished
    assert stacks == [[0, 1, 2]] * 3
    fit(store, tmp_path / "whole", config)
    assert outputs(tmp_path / "many") == outputs(tmp_path / "whole")
    assert (made["epochs"], len(made["members"])) == ([4, 4, 4], 3)
    heads = load_run(tmp_path / "many").heads
    assert isinstance(heads, Ensemble)
    fit(store, tmp_path / "alone", changed(config, training={"members": 1}))
    for name, tensor in load_run(tmp_path / "alone").heads.state_dict().items():
        torch.testing.assert_close(heads.members[0].state_dict()[name], tensor, msg=name)
    weights = [member.image.weight for member in heads.members]
    assert not any(torch.allclose(one, other, atol=0.01) for one, other in itertools.combinations(weights, 2))
    rows = (tmp_path / "many/history.csv").read_text().splitlines()
    assert rows[0].startswith("member,epoch,loss")
    assert [row.split(",")[0] for row in rows[1:]] == ["1"] * 4 + ["2"] * 4 + ["3"] * 4
    embeddings = read_embeddings(tmp_path / "many/embeddings.h5")
    assert embeddings.images.shape == (60, 48)
    pictures, captions, index = embeddings.split("dev")
    judged = measure(embeddings.images[pictures], embeddings.texts[captions], index)
    assert made["selection"]["rsum"] == pytest.approx(judged["rsum"])


def test_members_that_end_at_different_epochs_go_on_as_they_would_have(
    store, tmp_path, fit_config, changed, monkeypatch
):
    """Interrupted before each step of the way, the choosing and the second fit."""
    settings = {"members": 3, "num_epochs": 8, "check_every": 1, "patience": 2, "refit": True}
    config, work, companies = changed(fit_config, training=settings), training.train_epochs, []
    rsums = [1, 2, 0, 0], [1, 2, 3, 0, 0], [2, 1, 0]  # of each member after its epochs, on any machine
    validate = TrainingData.validate

    def foreseen(data, trial, _measure):
        rsum = rsums[trial.seed][trial.epoch - 1]
        return validate(data, trial, lambda *arrays: measure(*arrays) | {"rsum": rsum})

    def counted(trials, *rest):
        if len(companies) == interrupt_at:
            raise KeyboardInterrupt
        companies.append([trial.seed for trial in trials])
        work(trials, *rest)

    monkeypatch.setattr(TrainingData, "validate", foreseen)
    monkeypatch.setattr(training, "train_epochs", counted)
    interrupt_at = None
    made = fit(store, tmp_path / "whole", config)
    assert (made["epochs"], made["best_epochs"]) == ([4, 5, 3], [2, 3, 1])
    assert len({*made["epochs"]}) == len({*made["best_epochs"]}) == 3
    expected = [[seed for seed in range(3) if made["epochs"][seed] > epoch] for epoch in range(max(made["epochs"]))]
    again = [[seed for seed in range(3) if made["best_epochs"][seed] > epoch] for epoch in range(8)]
    whole = expected + [company for company in again if company]
    assert companies == whole
    for done in range(1, len(whole)):
        companies.clear()
        interrupt_at = done
        with pytest.raises(KeyboardInterrupt):
            fit(store, tmp_path / "resumed", config, force=True)
        companies.clear()
        interrupt_at = None
        fit(store, tmp_path / "resumed", config, force=True)
        assert companies == whole[done:]
        assert outputs(tmp_path / "resumed") == outputs(tmp_path / "whole")


def test_members_that_an_earlier_version_left_at_different_epochs_are_refused(store, tmp_path, fit_config, changed):
    config = changed(fit_config, training={"members": 2, "num_epochs": 4, "check_every": 2})
    looks = iter([1, 2])  # and no third one
    with pytest.raises(StopIteration):
        fit(store, tmp_path / "r", config, quality=lambda *arrays: measure(*arrays) | {"rsum": next(looks)})
    state = torch.load(tmp_path / "r/resume.pt", weights_only=True)
    state["points"][1]["epoch"] = 0
    save_resume(tmp_path / "r", state)
    with pytest.raises(TrainingError, match="begun by a version which fitted members one after another; fit again"):
        fit(store, tmp_path / "r", config)


def test_members_in_chunks_and_in_too_little_memory(store, tmp_path, fit_config, changed, monkeypatch, messages):
    config = changed(fit_config, training={"members": 3, "num_epochs": 2})
    one = trial_memory(config, store.dims)
    with pytest.raises(TrainingError, match=r"3 members take 2\.0 GiB at least; give so much --memory, or fit fewer"):
        fit(store, tmp_path / "r", config, memory=chunks.MIN_MEMORY + 2 * one - 1)
    monkeypatch.setattr(chunks, "OVERHEAD", chunks.MIN_MEMORY - 20_000)
    made = fit(store, tmp_path / "r", config, memory=chunks.MIN_MEMORY + 2 * one)
    assert made["chunks"] > 1
    assert f"the features do not fit 2.0 GiB: they are read in {made['chunks']} shuffled chunks an epoch" in messages
    assert len(load_run(tmp_path / "r").heads.members) == 3


def test_what_chose_is_fitted_on_as_well_once_all_is_chosen(store, tmp_path, fit_config, changed):
    scores = iter([1.0, 5.0, 2.0])

    def quality(*arrays):
        return measure(*arrays) | {"rsum": next(scores)}

    config = changed(fit_config, training={"num_epochs": 3, "check_every": 1})
    chosen = fit(store, tmp_path / "chosen", config, quality=quality)
    scores = iter([1.0, 5.0, 2.0])
    again = fit(store, tmp_path / "again", changed(config, training={"refit": True}), quality=quality)
    assert (chosen["train_pictures"], again["train_pictures"]) == (36, 48)
    for key in ("best_epochs", "selection", "betas"):
        assert again[key] == chosen[key]  # chosen by heads that had not seen the validation images
    assert outputs(tmp_path / "again")[2] == outputs(tmp_path / "chosen")[2]
    roles = store.roles().together()
    assert sorted(roles.train) == sorted(np.flatnonzero(np.array(store.image_splits) != "test"))
    data = TrainingData(store, roles, torch.device("cpu"), 2**40)
    trial = data.new_trial(config)
    stacking.train_epochs([trial], *data.chunks_of(config), 2)  # the best epoch, on the schedule of three
    expected = trial.heads.state_dict()
    for name, tensor in load_run(tmp_path / "again").heads.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_closed_form_member_chooses_before_it_has_seen_the_selection_pictures(
    store, tmp_path, fit_config, changed, monkeypatch
):
    made = {}
    for refit in (False, True):
        config = changed(fit_config, training={"num_epochs": 2, "cca": True, "refit": refit})
        made[refit] = fit(store, tmp_path / f"{refit}", config)
    for key in ("selection", "betas", "members"):
        assert made[True][key] == made[False][key]
    one, two = (load_run(tmp_path / f"{refit}").heads.members[1] for refit in (False, True))
    assert not torch.equal(one.image.weight, two.image.weight)
    with FeatureStore(store.path) as opened:
        roles = opened.roles().together()
        data = TrainingData(opened, opened.roles(), torch.device("cpu"), 2**40)
        monkeypatch.setattr(chunks, "BLOCK", 7)
        images, texts, index = data.averaged(roles.train, opened.image_index)
        assert torch.equal(images, data.standardised(roles.train).images.mean(1))
    both = Pairs(images.numpy(), texts.numpy(), index)
    found = (two.image.weight @ two.text.weight.T).detach().numpy()  # whatever the canonical directions' signs
    family = CCA(Moments.of(both))
    maps = [family.fit(candidate.settings) for candidate in family.candidates(both)]
    assert any(np.allclose(found, linear.image_map @ linear.text_map.T, atol=1e-4) for linear in maps)


def test_trap_a_closed_form_member_beside_mlps_is_loaded_again(store, tmp_path, fit_config, changed):
    config = changed(fit_config, model={"head": "mlp"}, training={"num_epochs": 1, "cca": True})
    made = fit(store, tmp_path / "r", config)
    assert [member["head"] for member in made["members"]] == ["mlp", "linear"]
    found = image_embeddings(load_run(tmp_path / "r").heads, store.image_features)
    np.testing.assert_array_equal(found, read_embeddings(tmp_path / "r/embeddings.h5").images)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_fit_interrupted_while_it_is_fitted_again_resumes_to_the_same_result(
    store, tmp_path, fit_config, changed, monkeypatch, steps, messages
):
    config = changed(
        fit_config, training={"num_epochs": 4, "members": 2, "check_every": 2, "patience": 1, "refit": True}
    )
    fit(store, tmp_path / "whole", config)
    calls, work = [], training.train_epochs

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 2 + steps - 1:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(training, "train_epochs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(store, tmp_path / "resumed", config)
    monkeypatch.setattr(training, "train_epochs", work)
    messages.clear()
    fit(store, tmp_path / "resumed", config)
    assert [line for line in messages if line.startswith("going")] == ["going on after epoch 4"] + (steps - 1) * [
        "going on after epoch 2"
    ]
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "resumed")


def test_refitted_runs_join_without_a_look_at_what_they_were_fitted_on(store, tmp_path, fit_config, changed):
    for seed in (0, 1):
        config = changed(fit_config, training={"seed": seed, "num_epochs": 2, "refit": True})
        fit(store, tmp_path / f"{seed}", config)
    runs = [load_run(tmp_path / name) for name in "01"]
    made = ensemble(store, runs, tmp_path / "both")
    assert made["selection"]["rsum"] == np.mean([run.provenance["selection"]["rsum"] for run in runs])
    embeddings = read_embeddings(tmp_path / "both/embeddings.h5")
    assert embeddings.betas == made["betas"]
    inherited = inherited_betas(*(run.provenance["betas"] for run in runs))
    roles = store.roles()
    vectors = (embeddings.images, embeddings.texts, embeddings.image_index)
    train = np.flatnonzero(np.array(embeddings.splits) == "train")
    assert fit_inverted_softmax(*vectors, train, roles.selection, inherited).betas == made["betas"]


def test_the_correction_that_the_config_asks_for_is_the_runs_own_way_to_search(store, tmp_path, fit_config, changed):
    config = changed(fit_config, model={"rerank": "qbnorm"}, training={"num_epochs": 1})
    fit(store, tmp_path / "r", config)
    embeddings = read_embeddings(tmp_path / "r/embeddings.h5")
    assert embeddings.rerank == "qbnorm"
    assert embeddings.gallery("image").biased
    assert not embeddings.gallery("image", rerank="none").biased
    np.testing.assert_array_equal(embeddings.gallery("text").vectors[:, -1], embeddings.text_bias)


def test_a_closed_form_of_shuffled_pairs_is_at_chance_too(store, tmp_path, fit_config, changed):
    rsums = {}
    for shuffled in (False, True):
        folder = tmp_path / f"{shuffled}"
        fit(store, folder, changed(fit_config, training={"num_epochs": 1, "cca": True, "shuffle_pairs": shuffled}))
        closed_form = load_run(folder).heads.members[1]
        rsums[shuffled] = measure(*embed(closed_form, store, store.roles().train))["rsum"]
    assert rsums[False] > 1.5 * rsums[True]  # on the pairs that the first one was fitted on


@pytest.mark.parametrize(
    ("noise", "closed_noise", "expected"), [(0.6, 0.61, 0.4), (0.61, 0.6, 0.5), (40.0, 0.3, 0.9), (0.3, 40.0, 0.0)]
)
def test_the_closed_form_weighs_what_the_validation_images_ask_for(noise, closed_noise, expected):
    generator = np.random.default_rng(0)

    def vectors(spread):
        images = generator.standard_normal((200, 16))
        texts = images + spread * generator.standard_normal((200, 16))
        return [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (images, texts)]

    index = np.arange(200)
    trained = vectors(noise)
    closed = vectors(closed_noise)
    assert chosen_share((*trained, index), (*closed, index), CCA_SHARE) == expected


@pytest.mark.parametrize(
    ("trained", "closed", "usual", "expected"),
    [(30, 70, 0.4, 0.7), (50, 40, 0.4, 0.4), (50, 50, 0.4, 0.4), (0, 9, 0.4, 0.9), (30, 70, 0.9, 0.9)],
)
def test_a_better_closed_form_has_its_part_of_both_rsums_where_few_images_tell_no_more(
    trained, closed, usual, expected, monkeypatch
):
    monkeypatch.setattr(closed_form_module, "rank", lambda images, *_: float(images[0, 0]))
    monkeypatch.setattr(closed_form_module, "report", lambda rankings, draws: {"rsum": rankings[0]})
    monkeypatch.setattr(closed_form_module, "is_mostly_noise", lambda *_: False)
    monkeypatch.setattr(closed_form_module, "clearly_best", lambda ranks, usual: usual)
    texts = np.ones((2, 1), np.float32)
    vectors = [(rsum * texts, texts, np.arange(2)) for rsum in (trained, closed)]
    assert chosen_share(*vectors, usual) == expected


def test_where_next_to_nothing_is_learned_the_closed_form_counts_most(messages):
    generator = np.random.default_rng(0)
    index = np.arange(400)

    def vectors(spread):
        images = generator.standard_normal((400, 16))
        texts = images + spread * generator.standard_normal((400, 16))
        return [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (images, texts)]

    trained, closed = (*vectors(9.0), index), (*vectors(5.0), index)
    assert 0.5 < separation(rank(*trained)) < separation(rank(*closed)) < 0.8
    assert chosen_share(trained, closed, CCA_SHARE) == 0.9
    assert any(line.startswith("next to nothing was learned") for line in messages)
    assert chosen_share(closed, trained, CCA_SHARE) == 0.3, "it is clearly better"
    messages.clear()
    learned = (*vectors(1.5), index)
    assert separation(rank(*learned)) > 0.8
    assert chosen_share(learned, trained, CCA_SHARE) == 0.1
    assert not any("next to nothing" in line for line in messages)


def test_the_scores_of_members_are_their_weighted_mean(store, tmp_path, fit_config, changed):
    made = fit(store, tmp_path / "r", changed(fit_config, training={"num_epochs": 1, "cca": True}))
    heads = load_run(tmp_path / "r").heads
    weights = [member["weight"] for member in made["members"]]
    assert sum(weights) == pytest.approx(1)
    scores = [images @ texts.T for images, texts, _ in (embed(member, store, np.arange(9)) for member in heads.members)]
    images, texts, _ = embed(heads, store, np.arange(9))
    np.testing.assert_allclose(images @ texts.T, weights[0] * scores[0] + weights[1] * scores[1], atol=1e-5)
    told = describe(tmp_path / "r")
    assert f"heads       one trained pair, and one in closed form with a weight of {weights[1]:g}" in told
    assert f"at epoch {made['best_epochs'][0]} of 1" in told
    assert "ensemble" not in told


def test_a_run_is_fine_tuned_and_its_curve_drawn_from_the_trained_pair_alone(store, tmp_path, fit_config, changed):
    fit(store, tmp_path / "r", changed(fit_config, training={"num_epochs": 1, "cca": True}))
    pair = load_run(tmp_path / "r").trained_pair()
    assert isinstance(pair.heads, DualHeads)
    assert pair.provenance["members"] == [
        {**dataclasses.asdict(pair.config.model), "loss": "contrastive", "weight": 1.0}
    ]
