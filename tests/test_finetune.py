"""Fine-tuning: unfreezing, cached activations, training, resume, and the new run that comes of it."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import onceover
from onceover.base.files import only_writer
from onceover.configs.schema import Config, FinetuneConfig, ModelConfig, TrainingConfig
from onceover.extract import backends
from onceover.extract.store import FeatureStore, StoreError
from onceover.heads import closed_form, finetune_loop, finetune_steps
from onceover.heads.activations import ImageActivations, write_activations
from onceover.heads.checkpoint import RunError, load_run, save_resume
from onceover.heads.completion import complete, finish
from onceover.heads.finetune import cache, finetune, towers_of
from onceover.heads.finetune_gradient import GradientComputer
from onceover.heads.finetune_loop import FinetuneError, Training
from onceover.heads.finetune_steps import Step
from onceover.heads.models import DualHeads
from onceover.heads.noise import Noise
from onceover.heads.towers import TowerError
from onceover.heads.unfreeze import Stages, UnfreezeError
from onceover.heads.workers import Workers
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.hubness import beta_of_spread
from onceover.retrieval.metrics import quality

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = FinetuneConfig(num_epochs=3, batch_size=12, micro_batch=12, learning_rate=1e-3, dtype="float32")


@pytest.fixture(scope="module")
def tiny_mobilenet(tmp_path_factory):
    """A narrow MobileNetV2 for images of 48 pixels, in a local folder."""
    from transformers import MobileNetV2Config, MobileNetV2ImageProcessor, MobileNetV2Model

    folder = tmp_path_factory.mktemp("tiny") / "mobilenet"
    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, image_size=48))
    with torch.no_grad():  # statistics of blots, so that signals come through
        blots = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4), size=48) * 2 - 1
        for _ in range(3):
            model.train()(blots)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    MobileNetV2ImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned_config(extract_config, tiny_mobilenet):
    encoders = dataclasses.replace(extract_config, image_encoder=f"hf:{tiny_mobilenet}", text_layers="auto")
    model = ModelConfig(embedding_dim=16, dropout=0.3, variation=0.5)
    return Config(encoders, model, TrainingConfig(num_epochs=6, batch_size=16, refit=False, cca=False))


@pytest.fixture(scope="module")
def base_file(tmp_path_factory, drawn, tuned_config):
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import extract

    path = tmp_path_factory.mktemp("store") / "base.h5"
    extract(read_dataset(drawn), path, tuned_config.extract, device="cpu")
    return path


@pytest.fixture(scope="module")
def base_run(tmp_path_factory, base_file, tuned_config):
    from onceover.heads.training import fit

    folder = tmp_path_factory.mktemp("runs") / "base"
    with FeatureStore(base_file) as store:
        fit(store, folder, tuned_config)
    return folder


@pytest.fixture
def tune(base_file, base_run, drawn, tmp_path):
    """Fine-tunes into ``tmp_path``; the heads are loaded anew each time, since training moves them.

    ``refit``: as if they had been fitted on the validation images as well.
    """

    def call(name="tuned", settings=SETTINGS, measure=quality, refit=False, **options):
        base = load_run(base_run)
        training = dataclasses.replace(base.config.training, refit=refit)
        base = dataclasses.replace(base, config=dataclasses.replace(base.config, training=training))
        with FeatureStore(base_file) as store, patch.object(finetune_loop, "quality", measure):
            return finetune(store, base, drawn, tmp_path / name, settings, **options)

    return call


def rising():
    """A measure by which each epoch is better than the one before."""
    numbers = itertools.count(1)
    return lambda *vectors: quality(*vectors) | {"rsum": float(next(numbers))}


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_it_trains_what_thaws_and_nothing_else(tune, tmp_path, base_run, tiny_mobilenet, tiny_bert):
    made = tune(unfreeze="image.layer.14,text.last1")
    assert made["best_epoch"] > 0
    assert made["rsum"] > made["start"] == pytest.approx(load_run(base_run).provenance["selection"]["rsum"], abs=2)
    for base, kind, thawed in (
        (tiny_mobilenet, "image", ("layer.14.", "layer.15.", "conv_1x1.")),
        (tiny_bert, "text", ("encoder.layer.1.",)),
    ):
        before, after = weights_of(base), weights_of(tmp_path / "tuned/encoders" / kind)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        expected = {name for name in before if name.startswith(thawed)}
        assert {name for name in expected - changed if "running" not in name and "num_batches" not in name} == set()
        assert changed <= expected


def test_trap_batch_norms_keep_their_statistics(tune, tmp_path, tiny_mobilenet):
    tune(unfreeze="image.all", cached=False, measure=rising())
    before, after = weights_of(tiny_mobilenet), weights_of(tmp_path / "tuned/encoders/image")
    statistics = [name for name in before if "running" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(
        before["conv_stem.first_conv.convolution.weight"], after["conv_stem.first_conv.convolution.weight"]
    )


def test_the_command_line_goes_from_a_run_to_a_better_run(run, fails, base_run, base_file, drawn, tmp_path, one_format):
    out = tmp_path / "tuned"
    call = ["finetune", "--run", base_run, "--data", drawn, "--store", base_file, "--out", out, "--device", "cpu"]
    call += ["--unfreeze", "image.last2", *settings_options()]
    result = run(*call)
    assert "captions: caching" not in result.stderr
    assert f"wrote encoders and heads to {out}" in result.stderr
    assert "--re-extract" in result.stderr.splitlines()[-1]
    assert "no features of theirs are there yet" in fails("evaluate", "--run", out)
    result = run(*call, "--re-extract")
    assert "fine-tuned with these settings already" in result.stderr
    made = json.loads((out / "run.json").read_text())
    with FeatureStore(base_file) as old, FeatureStore(out / "store.h5") as new:
        assert old.fingerprints["image"] != new.fingerprints["image"] == made["fingerprints"]["image"]
        assert old.fingerprints["text"] == new.fingerprints["text"]
        assert np.array_equal(old.text_features, new.text_features)
        assert (old.image_ids, old.captions) == (new.image_ids, new.captions)
        assert new.provenance["text"] == old.provenance["text"]
    assert re.search(r"rows encoded: 60 image, 0 text .* reused: 0 image, \d+ text", result.stderr)
    assert made["selection"]["rsum"] == pytest.approx(json.loads((out / "finetune.json").read_text())["rsum"], abs=2)
    run("evaluate", "--run", out)
    assert "images/" in run("search", "--run", out, "--query", "a red circle", "--device", "cpu").stdout
    run("index", "--run", out, "--device", "cpu")
    run("plot", "--run", out, "--out", tmp_path / "figures")
    assert "rsum" in run("compare", base_run, out).stdout
    assert "already" in run(*call, "--re-extract").stderr


def test_a_run_that_was_fitted_on_the_validation_images_goes_on_with_them(
    run, base_file, drawn, tuned_config, tmp_path, monkeypatch, one_format
):
    training = dataclasses.replace(tuned_config.training, refit=True, cca=True)
    monkeypatch.setattr(closed_form, "is_mostly_noise", lambda *_: False)
    with FeatureStore(base_file) as store:
        roles = store.roles()
        base = onceover.fit(store, tmp_path / "base", dataclasses.replace(tuned_config, training=training))
    assert len(base.provenance["members"]) == 2, "a closed form stands beside the trained heads, and is left out"
    trained = set()
    load = finetune_steps.StepLoader.load

    def watched(loader, epoch, number, batch):
        trained.update(batch.images.tolist())
        return load(loader, epoch, number, batch)

    monkeypatch.setattr(finetune_steps.StepLoader, "load", watched)
    rows_to_encode = {}
    choose = backends.backend_for

    def chosen(name, kind, rows, *of_machine):
        rows_to_encode[kind] = rows
        return choose(name, kind, rows, *of_machine)

    monkeypatch.setattr(backends, "backend_for", chosen)
    last = {}
    train = Training.run

    def to_the_end(self, save):
        train(self, save)
        last.update({name: tensor.clone() for name, tensor in self.heads.state_dict().items()})

    monkeypatch.setattr(Training, "run", to_the_end)
    out = tmp_path / "tuned"
    call = ["finetune", "--run", base.folder, "--data", drawn, "--store", base_file, "--out", out, "--device", "cpu"]
    result = run(*call, "--unfreeze", "image.last2", "--re-extract", *settings_options())
    assert "and is fine-tuned on them too: the last epoch counts" in result.stderr
    assert "3 epochs on train and validation images" in result.stderr
    assert rows_to_encode == {"image": 60, "text": 0}, "the store that is reused has no images of the new encoder"
    assert trained == {*roles.train.tolist(), *roles.selection.tolist()}
    record = json.loads((out / "finetune.json").read_text())
    assert (record["best_epoch"], record["epochs"], record["start"], record["rsum"]) == (3, 3, None, None)
    tuned = load_run(out)
    assert tuned.provenance["selection"] == base.provenance["selection"] | {"rsum": None}
    assert "rsum not measured" in repr(tuned)
    assert "rsum not measured" in run("info", out).stdout
    assert all(torch.equal(tensor, last[name]) for name, tensor in tuned.heads.state_dict().items())
    embeddings = read_embeddings(out / "embeddings.h5")
    gallery = embeddings.images[roles.selection]
    bank = embeddings.texts[np.isin(embeddings.image_index, np.flatnonzero(np.array(embeddings.splits) == "train"))]
    assert tuned.provenance["betas"]["image"] == beta_of_spread(gallery, bank) > 0
    assert "rsum" not in (out / "history.csv").read_text()
    run("report", "--run", out, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "fine-tuned up to epoch 3" in page
    assert "then fitted again and fine-tuned, these images included" in page
    run("plot", "--run", out, "--out", tmp_path / "figures")
    assert (tmp_path / "figures/training.png").exists()


def test_a_distilled_pair_that_is_fine_tuned_is_trained_and_no_longer_distilled(base_file, base_run, drawn, tmp_path):
    loaded = load_run(base_run)
    distilled = dataclasses.replace(loaded, provenance=loaded.provenance | {"distilled": "elsewhere"})
    with FeatureStore(base_file) as store:
        finetune(store, distilled, drawn, tmp_path / "tuned", SETTINGS, unfreeze="image.last1")
        complete(store, drawn, tmp_path / "tuned", "cpu")
    assert "distilled" not in load_run(tmp_path / "tuned").provenance


def settings_options():
    return [
        part
        for name, value in dataclasses.asdict(SETTINGS).items()
        for part in ("--set", f"finetune.{name}={json.dumps(value)}")
    ]


class Killed(Exception):
    pass


@pytest.mark.parametrize("refit", [False, True])
def test_trap_an_interrupted_training_ends_in_the_same_bytes(tune, tmp_path, monkeypatch, messages, refit):
    whole = tune("whole", unfreeze="image.last1,text.last1", refit=refit)
    monkeypatch.setattr(finetune_loop, "SAVE_EVERY", 0.0)
    train, calls = Training.train, []

    def dies(self, *arguments):
        calls.append(None)
        if len(calls) == 5:  # within the second epoch
            raise Killed
        return train(self, *arguments)

    monkeypatch.setattr(Training, "train", dies)
    with pytest.raises(Killed):
        tune("cut", unfreeze="image.last1,text.last1", refit=refit)
    messages.clear()
    again = tune("cut", unfreeze="image.last1,text.last1", refit=refit)
    assert any("going on in epoch" in line for line in messages)
    assert any("cached activations are taken from" in line for line in messages)
    for name in ("heads.safetensors", "encoders/image/model.safetensors", "encoders/text/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert again["weights"] == whole["weights"]


def test_trap_stale_features_are_refused(base_run, store_file, drawn, tmp_path):
    with FeatureStore(store_file) as store, pytest.raises(RunError, match="was not fitted on the features of"):
        finetune(store, load_run(base_run), drawn, tmp_path / "tuned", SETTINGS)
    assert not (tmp_path / "tuned/finetune.json").exists()


def test_trap_another_encoder_is_refused(tune, tiny_mobilenet, tmp_path):
    other = shutil.copytree(tiny_mobilenet, tmp_path / "other")
    weights = weights_of(other)
    weights["conv_1x1.convolution.weight"] += 1
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"the image encoder is not the one .*\(they differ in: weights\)"):
        tune(encoders={"image": f"hf:{other}"})


def test_trap_a_fine_tuned_encoder_never_hits_its_bases_cache(tune, base_file, drawn, tuned_config, tmp_path):
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import extract

    made = tune(measure=rising(), unfreeze="image.last1")
    with FeatureStore(base_file) as store, pytest.raises(RunError, match="the image features are not those of the"):
        finish(store, tmp_path / "tuned")
    config = dataclasses.replace(tuned_config.extract, image_encoder=made["encoders"]["image"])
    copied = shutil.copy(base_file, tmp_path / "copy.h5")
    with pytest.raises(StoreError, match=r"holds other image features \(they differ in: .*weights"):
        extract(read_dataset(drawn), copied, config, device="cpu")


def test_trap_an_exploding_loss_says_what_to_lower(tune, tmp_path):
    wild = dataclasses.replace(SETTINGS, learning_rate=1e30, warmup=0.0)
    with pytest.raises(FinetuneError, match="not finite in epoch 1, step .*lower finetune.learning_rate"):
        tune(settings=wild)
    assert not (tmp_path / "tuned/finetune.json").exists()


def test_trap_a_changed_picture_is_noticed(base_file, base_run, drawn, tmp_path):
    data = shutil.copytree(drawn, tmp_path / "data")
    with FeatureStore(base_file) as store:
        path = data / store.image_paths[int(store.roles().train[0])]
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(TowerError, match="is not the image that the store was made of"):
            finetune(store, load_run(base_run), data, tmp_path / "tuned", SETTINGS)


def test_an_ensemble_and_the_run_to_start_from_are_refused(base_file, base_run, drawn, tmp_path):
    from onceover.heads.models import Ensemble

    loaded = load_run(base_run)
    of_two = loaded.provenance | {"best_epochs": [1, 1]}
    joined = dataclasses.replace(loaded, heads=Ensemble([loaded.heads, loaded.heads]), provenance=of_two)
    with FeatureStore(base_file) as store, pytest.raises(RunError, match="the run to start from; name a new folder"):
        finetune(store, loaded, drawn, base_run, SETTINGS, force=True)
    assert load_run(base_run).provenance == loaded.provenance
    with FeatureStore(base_file) as store, pytest.raises(RunError, match="is an ensemble"):
        finetune(store, joined, drawn, tmp_path / "tuned", SETTINGS)


def test_other_settings_do_not_go_on_with_a_training(tune, tmp_path):
    tune(unfreeze="text.last1")
    with pytest.raises(RunError, match="other settings"):
        tune(unfreeze="text.last2")
    assert tune(unfreeze="text.last2", force=True)["unfreeze"] == "text.last2"


@pytest.mark.parametrize(
    ("unfreeze", "message"),
    [
        ("layer4", "'layer4' names no layer"),
        ("audio.last1", "'audio.last1' names no layer"),
        ("image.layer.99", "no layer 'layer.99' to unfreeze; near are image.layer.9"),
        ("image.last0", "has 16 blocks that are numbered; name a layer"),
        ("image.all", "nothing is left to cache; add --no-cache"),
    ],
)
def test_a_wrong_choice_of_layers_is_named(tune, unfreeze, message):
    with pytest.raises(UnfreezeError, match=message):
        tune(unfreeze=unfreeze)


def test_gradient_caching_gives_the_gradient_of_the_whole_batch(tune, tiny_mobilenet, tiny_bert, tmp_path):
    settings = dataclasses.replace(SETTINGS, num_epochs=1, learning_rate=1e-3)
    tune("whole", settings, rising(), unfreeze="last")
    tune("parts", dataclasses.replace(settings, micro_batch=5), rising(), unfreeze="last")
    for kind, base in (("image", tiny_mobilenet), ("text", tiny_bert)):  # AdamW blows up the rounding of tiny gradients
        whole, parts = (
            moved(weights_of(base), weights_of(tmp_path / n / "encoders" / kind)) for n in ("whole", "parts")
        )
        assert torch.cosine_similarity(whole, parts, dim=0) > 0.9999
    one, other = (safetensors.torch.load_file(tmp_path / n / "heads.safetensors") for n in ("whole", "parts"))
    assert all(torch.allclose(one[name].float(), other[name].float(), atol=1e-4) for name in one)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_the_gradient_from_cached_activations_is_that_of_whole_passes(base_file, base_run, drawn, tmp_path, checkpoint):
    settings = dataclasses.replace(SETTINGS, checkpoint=checkpoint)
    chosen = {"image": ["layer.14"], "text": ["last1"]}
    found = []
    for cached in (True, False):
        with FeatureStore(base_file) as store:
            run, rows = load_run(base_run), store.roles().train[:6]
            specs = {kind: run.provenance["encoders"][kind]["encoder"] for kind in ("image", "text")}
            towers = towers_of(store, run, drawn, settings, chosen, specs, torch.device("cpu"))
            if cached:
                cache(towers, tmp_path)
            captions = np.flatnonzero(np.isin(store.image_index, rows))
            parts = towers["image"].micro_batches(rows, rows % 2) + towers["text"].micro_batches(captions)
            features = [towers["image"].forward(parts[0]), towers["text"].forward(parts[1])]
            stored = store.image_features[rows, rows % 2], store.text_features[captions[parts[1].positions]]
            for live, frozen in zip(features, stored, strict=True):
                assert np.allclose(live.detach(), frozen, atol=2e-2 * np.abs(frozen).max())
            sum(each.square().sum() for each in features).backward()
            found.append({kind: tower.unfrozen_parameters() for kind, tower in towers.items()})
    for kind, thawed in found[0].items():
        gradients = [torch.cat([each.grad.flatten() for each in one[kind].values()]) for one in found]
        assert len(thawed) > 10
        assert torch.cosine_similarity(*gradients, dim=0) > 0.9999


@pytest.mark.parametrize("case", ["resnet", "clip image", "clip text", "bert"])
def test_a_pass_from_the_cut_is_the_whole_pass(case, tiny_clip, tiny_bert):
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder

    if case in ("resnet", "clip image"):
        spec = "torchvision:resnet18@random" if case == "resnet" else f"hf:{tiny_clip}"
        encoder = ImageEncoder(spec, layers="auto", device="cpu", plain=True)
        inputs = encoder.pixels(Image.linear_gradient("L").convert("RGB"))
    else:
        encoder = TextEncoder(
            f"hf:{tiny_clip if 'clip' in case else tiny_bert}", layers="auto", device="cpu", plain=True
        )
        ids, _ = encoder.tokenize(["a red circle", "a circle above a blue square"])
        inputs = encoder.padded([torch.tensor(row) for row in ids])
    stages = Stages(encoder.model, lambda: encoder.outputs(inputs))
    lowest = stages.lowest(["last1"], "image")
    depths = stages.unfreeze(lowest)
    whole = encoder.outputs(inputs)
    whole[0].square().sum().backward()
    assert set(depths) == {name for name, each in encoder.model.named_parameters() if each.grad is not None}
    cut = stages.cut(lowest)
    with torch.no_grad():
        with cut.stopping():
            activations = cut.below(lambda: encoder.outputs(inputs))
        with cut.entered(activations):
            upper = encoder.outputs(inputs)
    for one, other in zip(whole, upper, strict=True):
        if one.requires_grad:
            assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(encoder.outputs(inputs)[0], whole[0], atol=1e-6)  # the model is as it was


def test_trap_a_checkpointed_block_is_passed_again_in_another_thread():
    """As on a card, where the way back has a thread of its own."""
    from onceover.extract.encoding.image import ImageEncoder

    encoder = ImageEncoder("torchvision:resnet18@random", layers="layer4.1.conv1,last", device="cpu", plain=True)
    inputs = encoder.pixels(Image.linear_gradient("L").convert("RGB"))
    stages = Stages(encoder.model, lambda: encoder.outputs(inputs))
    lowest = stages.lowest(["last1"], "image")
    stages.unfreeze(lowest)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            stages.checkpoint(lowest)
        loss = sum(output.square().sum() for output in encoder.outputs(inputs))
        with ThreadPoolExecutor(1) as other:
            other.submit(loss.backward).result()
        gradients.append([each.grad for each in encoder.model.parameters() if each.grad is not None])
        encoder.model.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_a_torchvision_encoder_is_saved_whole(drawn, tmp_path, fit_config, changed):
    config = changed(fit_config, extract={"image_encoder": "torchvision:shufflenet_v2_x0_5@random", "views": 1})
    store = onceover.extract_features(drawn, tmp_path / "s.h5", config=config.extract, device="cpu")
    start = onceover.fit(store, tmp_path / "run", config, device="cpu")
    with store, patch.object(finetune_loop, "quality", rising()):
        made = finetune(store, start, drawn, tmp_path / "tuned", SETTINGS, unfreeze="image.conv5")
    assert made["encoders"]["image"].startswith("torchvision:shufflenet_v2_x0_5@/")
    assert made["encoders"]["image"].endswith("tuned/encoders/image/weights.safetensors")
    assert made["weights"]["image"] != made["base"]["recipes"]["image"]["weights"]
    assert made["weights"]["text"] == made["base"]["recipes"]["text"]["weights"]


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("variation", [0.0, 0.7])
def test_what_encoders_give_is_moved_by_stored_features_and_dropped_out(variation, kind):
    generator = np.random.default_rng(0)
    model = ModelConfig(embedding_dim=4, dropout=0.5, block_dropout=0.5, variation=variation)
    heads, places = DualHeads(5, 5, model), np.array([2, 0])  # of a batch of three
    heads.standardize[kind].fit(lambda: [torch.randn(50, 5, generator=torch.Generator().manual_seed(0))])
    features, first, second = (torch.from_numpy(generator.standard_normal((n, 5), np.float32)) for n in (2, 3, 3))
    bits, share = generator.integers(256, size=(3, 5), dtype=np.uint8), generator.random((3, 1), np.float32)
    noise = Noise(bits, np.arange(3), np.arange(3), share, np.array([4, 0, 1] if kind == "image" else [], np.int64))
    transfer = {kind: (first, second)} if variation else {}
    step = Step(None, {kind: noise}, transfer, None, None)
    tower = SimpleNamespace(forward=lambda batch: features.requires_grad_())
    computer = GradientComputer(heads, {kind: tower}, model, 3, SimpleNamespace(device=torch.device("cpu")))
    found = computer.embed(kind, SimpleNamespace(positions=places), step)
    standard, one, other = (heads.standardize[kind](rows) for rows in (features, first[places], second[places]))
    kept = 2.0 * torch.from_numpy(bits[places] >= 128)
    if kind == "image":  # two of five numbers are left out, from the second and from the last on
        kept *= 5 / 3 * torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 1, 0]])
    moved_features = standard + variation * torch.from_numpy(share[places]) * (one - other)
    expected = getattr(heads, kind)(moved_features * kept)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(vectors.square().sum(), features)[0] for vectors in (found, expected))
    torch.testing.assert_close(*gradients)


def moved(before, after):
    return torch.cat([(after[name] - before[name]).flatten().float() for name in before])


def test_an_encoder_that_cannot_be_saved_is_found_before_anything_is_trained(tune, monkeypatch, tmp_path):
    def damaged(_encoder, _folder):
        raise RuntimeError("size mismatch for pos_embedding")

    monkeypatch.setattr("onceover.extract.encoding.image.ImageEncoder.save", damaged)
    save_resume(tmp_path / "tuned", {})
    (tmp_path / "tuned/.text.4194305.aside/model").mkdir(parents=True)  # of a training that was killed
    with pytest.raises(FinetuneError, match=r"the image encoder cannot be saved.* \(size mismatch for pos_embedding\)"):
        tune(measure=None)  # which the first look would call
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {".onceover.json", "resume.pt"}


def test_where_nothing_was_better_heads_and_encoders_stay(tune, base_run, tmp_path, tiny_mobilenet):
    numbers = itertools.count(1)
    made = tune(measure=lambda *vectors: quality(*vectors) | {"rsum": -float(next(numbers))})
    assert (made["best_epoch"], made["epochs"]) == (0, 3)
    assert made["encoders"]["image"] == f"hf:{tiny_mobilenet}"
    assert not (tmp_path / "tuned/encoders").exists()
    one, two = (safetensors.torch.load_file(folder / "heads.safetensors") for folder in (base_run, tmp_path / "tuned"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def train_as(rank, processes, port, *places):
    """Fine-tunes as one of several processes, with the variables of torchrun."""
    folder, base_file, base_run, drawn = places
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    signal.alarm(500)  # ends one that waits for the other in vain
    torch.set_num_threads(1)
    finetune_loop.quality = rising()
    settings = FinetuneConfig(num_epochs=1, batch_size=12, micro_batch=4, dtype="float32")
    with FeatureStore(base_file) as store:
        finetune(store, load_run(base_run), drawn, folder, settings, unfreeze="image.last2,text.last1")


def train_in(forkserver, processes, *places):
    """Fine-tunes in several processes."""
    port = free_port()
    running = []
    for rank in range(processes):
        running.append(forkserver.Process(target=train_as, args=(rank, processes, port, *places)))
        running[-1].start()
    for process in running:
        process.join(600)
    assert [process.exitcode for process in running] == [0] * processes


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_trap_processes_that_find_the_activations_cached_do_not_wait_for_each_other(tmp_path, messages):
    path = tmp_path / "image.h5"
    given = path, "fingerprint", (4, 1, 2), lambda: [np.ones((4, 1, 2))], "images"
    write_activations(*given)
    with only_writer(path, "the activations"):  # another process that looks too
        write_activations(*given)
    assert messages[1:] == [f"images: cached activations are taken from {path}"]
    np.testing.assert_array_equal(ImageActivations(path).gather(np.array([3]), np.array([0])), [[1, 1]])


def test_trap_summed_gradients_meet_the_weights_that_they_are_of(monkeypatch):
    """A fused step walks through the memory, where a convolution's channels may lie last."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _flat: None)  # the other process adds nothing
    workers = Workers(torch.device("cpu"))
    found = {}
    for workers.size in (1, 2):
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
        workers.sum_gradients(layer.parameters())
        optimizer.step()
        found[workers.size] = layer.weight.detach()
    assert torch.equal(found[1], found[2])


def test_two_processes_train_as_one_does(
    tune, base_file, base_run, drawn, tmp_path, tiny_mobilenet, tiny_bert, forkserver
):
    settings = FinetuneConfig(num_epochs=1, batch_size=12, micro_batch=12, dtype="float32")
    tune("one", settings, rising(), unfreeze="image.last2,text.last1")
    train_in(forkserver, 2, tmp_path / "two", base_file, base_run, drawn)
    for kind, base in (("image", tiny_mobilenet), ("text", tiny_bert)):
        start = weights_of(base)
        one, two = (moved(start, weights_of(tmp_path / name / "encoders" / kind)) for name in ("one", "two"))
        assert torch.cosine_similarity(one, two, dim=0) > 0.9999
    one, two = (safetensors.torch.load_file(tmp_path / name / "heads.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-3) for name in one)
    losses = [
        [float(row.split(",")[1]) for row in (tmp_path / name / "history.csv").read_text().splitlines()[1:]]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
