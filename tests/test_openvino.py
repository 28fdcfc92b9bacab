"""The backend OpenVINO: what it computes and in what precision, when it is chosen, and what happens where it cannot."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from onceover.base.files import read_record, write_record
from onceover.extract import backends
from onceover.extract.backends import BackendError, agree, backend_for, openvino, readied
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import KINDS, FeatureStore, StoreError, parts_folder
from onceover.extract.verify import verify_sample

SHUFFLENET = "torchvision:shufflenet_v2_x0_5@random"
CPU = torch.device("cpu")
needs_openvino = pytest.mark.skipif(
    not find_spec("openvino") or not hasattr(torch.export.Dim, "DYNAMIC"),
    reason="OpenVINO is missing, or torch is too old to export for it",
)


def pixels(encoder, count):
    image = Image.linear_gradient("L").convert("RGB")
    return torch.stack([encoder.pixels(image.rotate(7 * number)) for number in range(count)])


@pytest.fixture(scope="module")
def images(tiny_resnet):
    """The same encoder twice: by torch alone, and by OpenVINO."""
    if not find_spec("openvino") or not hasattr(torch.export.Dim, "DYNAMIC"):
        pytest.skip("OpenVINO is missing, or torch is too old to export for it")
    return [encoder_of(tiny_resnet, name) for name in ("plain", "openvino")]


def encoder_of(folder, backend):
    return ImageEncoder(f"hf:{folder}", layers="encoder.stages.0, last, embedder", device="cpu", backend=backend)


def test_all_layers_come_back_whatever_the_number_of_images(images):
    plain, converted = images
    assert converted.backend == "openvino", "it has not stayed eager"
    batch = pixels(plain, 5)
    expected = torch.from_numpy(plain.encode(batch))
    for count in (5, 1, 4):
        features = torch.from_numpy(converted.encode(batch[:count]))
        assert features.shape == (count, 1, 8 + 16 + 8)
        for start, stop in ((0, 8), (8, 24), (24, 32)):
            assert agree(features[..., start:stop], expected[:count, ..., start:stop])


def test_trap_float32_is_computed_in_float32_where_openvino_would_take_bfloat16(images):
    """The features of a sample are rounded a thousand times finer than in bfloat16, which it takes by itself."""
    plain, converted = images
    batch = pixels(plain, 3)
    expected = plain.encode(batch)
    error = np.abs(converted.encode(batch) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def test_features_are_the_same_however_many_threads_compute(images, tiny_resnet):
    batch = pixels(images[0], 3)
    expected = images[1].encode(batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        features = encoder_of(tiny_resnet, "openvino").encode(batch)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(features, expected)


def compiled(precision):
    """As OpenVINO compiles, for a processor that computes in this precision whatever is asked for."""
    asked = []
    model = SimpleNamespace(get_property=lambda _: SimpleNamespace(get_type_name=lambda: precision))

    def compile_model(_model, device, options):
        asked.append((device, options))
        return model

    return asked, lambda: SimpleNamespace(compile_model=compile_model)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")])
def test_precision_and_threads_are_always_set(dtype, precision, monkeypatch):
    asked, library = compiled(precision)
    monkeypatch.setattr(openvino, "_core", library)
    openvino._compiled(None, getattr(torch, dtype))
    threads = torch.get_num_threads()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
    assert [(device, options.items() <= given.items()) for device, given in asked] == [("CPU", True)]


def test_trap_a_precision_that_openvino_replaces_by_another_is_refused(monkeypatch):
    """Asked for float16, it computes in bfloat16 where a processor has only that, and does not say so."""
    monkeypatch.setattr(openvino, "_core", compiled("bf16")[1])
    with pytest.raises(BackendError, match="would compute in bf16 here where f16 is asked for"):
        openvino._compiled(None, torch.float16)


@needs_openvino
def test_captions_of_any_number_and_length_are_encoded(tiny_bert):
    captions = ["a dog", "a red ball on the beach with two children", "a", "dogs " * 40]
    encoders = [TextEncoder(f"hf:{tiny_bert}", layers="auto", device="cpu", backend=name)
                for name in ("plain", "openvino")]  # fmt: skip
    assert encoders[1].backend == "openvino"
    for chosen in (captions, captions[:2], captions[2:3], captions[3:]):
        expected, features = (torch.from_numpy(encoder.encode(chosen)[0]) for encoder in encoders)
        assert features.shape == (len(chosen), 3 * 32)
        assert agree(features, expected)


@needs_openvino
def test_a_dual_encoder_is_exported_too(tiny_clip):
    texts = [TextEncoder(f"hf:{tiny_clip}", device="cpu", backend=name) for name in ("plain", "openvino")]
    photos = [ImageEncoder(f"hf:{tiny_clip}", device="cpu", backend=name) for name in ("plain", "openvino")]
    assert texts[1].backend == photos[1].backend == "openvino"
    expected, features = (torch.from_numpy(encoder.encode(["a dog", "a red star above"])[0]) for encoder in texts)
    assert agree(features, expected)
    expected, features = (torch.from_numpy(encoder.encode(pixels(encoder, 3))) for encoder in photos)
    assert agree(features, expected)


@pytest.mark.parametrize(
    ("name", "kind", "rows", "engine", "device", "capability", "is_installed", "expected"),
    [
        ("auto", "image", 200, "threads", "cpu", "AVX512", True, "openvino"),
        ("auto", "image", 200, "threads", "cpu", "AVX2", True, "openvino"),
        ("auto", "text", 1000, "threads", "cpu", "AVX512", True, "openvino"),
        ("auto", "image", 199, "threads", "cpu", "AVX512", True, "eager"),
        ("auto", "text", 999, "threads", "cpu", "AVX512", True, "eager"),
        ("auto", "image", 200, "threads", "cpu", "AVX512", False, "eager"),
        ("auto", "image", 200, "threads", "cpu", "DEFAULT", True, "eager"),
        ("auto", "image", 200, "processes", "cpu", "AVX512", True, "eager"),
        ("auto", "image", 200, "threads", "meta", "AVX512", True, "eager"),
        ("openvino", "image", 1, "processes", "cpu", "DEFAULT", False, "openvino"),
        ("eager", "image", 9999, "threads", "cpu", "AVX512", True, "eager"),
    ],
)
def test_auto_takes_openvino_where_it_is_installed_and_pays(
    name, kind, rows, engine, device, capability, is_installed, expected, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(backends, "find_spec", lambda _: object() if is_installed else None)
    assert backend_for(name, kind, rows, engine, torch.device(device)) == expected


class Branching(nn.Module):
    """A network that torch cannot export: its way depends on what it is given."""

    def forward(self, batch):
        if batch.sum() > 0:
            return batch.mean((2, 3))
        return batch.amax((2, 3))


@needs_openvino
def test_a_network_that_cannot_be_exported_stays_eager_and_that_is_told(monkeypatch, told):
    from onceover.extract.encoders import torchvision

    load = torchvision.load_image
    monkeypatch.setattr(torchvision, "load_image", lambda *given: load(*given)._replace(
        module=Branching(), pool=lambda module, batch: module(batch)))  # fmt: skip
    encoder = ImageEncoder(SHUFFLENET, device="cpu", backend="openvino")
    assert encoder.backend == "eager"
    assert told.pop(0) == "converting the image encoder, for some seconds"
    assert [line.split("(")[0] for line in told] == [
        "the backend openvino is not used, but eager: the network cannot be exported "
    ]
    assert "\n" not in told[0]
    batch = pixels(encoder, 2)
    assert np.isfinite(encoder.encode(batch)).all()


@needs_openvino
def test_a_converted_network_with_other_features_is_given_up(monkeypatch, told, tiny_bert):
    monkeypatch.setattr(openvino, "agree", lambda *_: False)
    encoder = TextEncoder(f"hf:{tiny_bert}", device="cpu", backend="openvino")
    assert encoder.backend == "eager"
    assert told[1:] == ["the backend openvino is not used, but eager: the converted network gives other features"]


def test_a_backend_that_refuses_gives_way_to_eager(told):
    def ready(backend):
        if backend is openvino:
            raise BackendError("for some reason")
        return backend.__name__

    assert readied("openvino", ready) == ("eager", "onceover.extract.backends.eager")
    assert told == ["the backend openvino is not used, but eager: for some reason"]


def test_another_device_than_a_processor_is_refused():
    with pytest.raises(BackendError, match="on a processor alone, and the device is meta"):
        openvino.image(None, None, torch.device("meta"), torch.float32)


def test_asked_for_and_not_installed_is_an_error_that_says_how_to_install_it(fails, drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    store = tmp_path / "s.h5"
    message = fails("extract", "--data", drawn, "--store", store, "--backend", "openvino", "--device", "cpu",
                    "--image-encoder", SHUFFLENET, "--text-encoder", "hf:distilbert-base-uncased@random")  # fmt: skip
    assert "pip install 'onceover-retrieval[openvino]'" in message
    assert "or choose --backend eager" in message
    assert list(tmp_path.glob("s.h5*")) == []


def test_an_unknown_backend_is_refused_before_anything_is_encoded(fails, drawn, tmp_path):
    message = fails("extract", "--data", drawn, "--store", tmp_path / "s.h5", "--backend", "openwine", code=2)
    assert message == "there is no backend 'openwine'; did you mean 'openvino'?"


IN_A_PROCESS = """
import gc, pathlib, signal, socket, sys, tempfile
from types import SimpleNamespace

import torch

home = pathlib.Path(tempfile.mkdtemp())
pathlib.Path.home = classmethod(lambda _: home)
def forbidden(*_):
    raise SystemExit("a connection was opened")
socket.socket.connect = forbidden

from onceover.extract.backends import openvino

linear = torch.nn.Linear(3, 2).requires_grad_(False)
network = SimpleNamespace(module=linear, features=lambda inputs: linear(inputs["rows"]))
rows = torch.ones(2, 3)
model = openvino._converted(network, {"rows": rows}, [0])
first = openvino._compiled(model, torch.float32)
second = openvino._compiled(model, torch.float32)
assert torch.allclose(first(rows), linear(rows))
assert "openvino_telemetry" not in sys.modules
assert list(home.iterdir()) == []
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


@needs_openvino
def test_trap_openvino_reports_no_usage_and_leaves_signals_and_the_home_folder_alone():
    """Models that end in another order than they began took away the stack on which signals are handled."""
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "handled\n"


@pytest.fixture(scope="module")
def small_config(extract_config, tiny_clip):
    """Encoders that are exported in no time."""
    return replace(extract_config, image_encoder=f"hf:{tiny_clip}")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, drawn, small_config):
    """A store that torch made, and one that OpenVINO made."""
    if not find_spec("openvino") or not hasattr(torch.export.Dim, "DYNAMIC"):
        pytest.skip("OpenVINO is missing, or torch is too old to export for it")
    folder = tmp_path_factory.mktemp("openvino")
    paths = [folder / "eager.h5", folder / "openvino.h5"]
    for path in paths:
        extract(read_dataset(drawn), path, small_config, device="cpu", backend=path.stem)
    return paths


def test_a_store_says_which_backend_made_it_and_verify_what_difference_that_makes(stores, run):
    with FeatureStore(stores[0]) as eager, FeatureStore(stores[1]) as store:
        assert store.fingerprints == eager.fingerprints
        for kind in KINDS:
            assert store.provenance[kind]["backend"] == "openvino"
            assert store.provenance[kind]["openvino"]
            assert eager.provenance[kind]["backend"] == "eager"
            difference = np.abs(store.features(kind)[:] - eager.features(kind)[:]).max()
            assert 0 < difference <= 1e-4 * np.abs(eager.features(kind)[:]).max()
        lines, problems = verify_sample(store, 3, device="cpu")
    assert problems == []
    assert all("float32 by openvino, stored as float32" in line for line in lines)
    assert run("info", stores[1]).stdout.count("on cpu, engine threads, backend openvino, ") == 2


@pytest.fixture
def begun(drawn, tmp_path, small_config, monkeypatch, interrupt_after):
    """Begins an extraction by a backend, which ends after a shard."""

    def begin(backend):
        path = tmp_path / "s.h5"
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                extract(read_dataset(drawn), path, small_config, device="cpu", backend=backend)
        return path

    return begin


@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "by an earlier version"])
def test_an_unfinished_extraction_keeps_its_backend(is_recorded, begun, drawn, small_config, monkeypatch):
    """With ``auto`` it would be encoded by OpenVINO here; an earlier version recorded none, and had torch alone."""
    path = begun("eager")
    monkeypatch.setattr(backends, "CONVERSION_PAYS", {"image": 0, "text": 0})
    file = parts_folder(path) / "settings.json"
    settings = read_record(file, "settings")
    assert settings["backend"] == "eager"
    assert settings["backends"] == {"image": "eager", "text": "eager"}
    if not is_recorded:
        del settings["backend"]
        del settings["backends"]
        write_record(file, settings)
    extract(read_dataset(drawn), path, small_config, device="cpu")
    with FeatureStore(path) as store:
        assert [store.provenance[kind]["backend"] for kind in KINDS] == ["eager", "eager"]


def test_an_unfinished_extraction_is_gone_on_with_by_no_other_backend_that_is_asked_for(begun, drawn, small_config):
    path = begun("auto")
    with pytest.raises(StoreError, match="was begun with --backend auto; go on with that, or discard it with --force"):
        extract(read_dataset(drawn), path, small_config, device="cpu", backend="plain")
    extract(read_dataset(drawn), path, small_config, device="cpu", backend="eager")  # which auto has chosen
    with FeatureStore(path) as store:
        assert store.provenance["image"]["backend"] == "eager"


def test_force_discards_what_another_backend_began(begun, drawn, small_config):
    path = begun("eager")
    extract(read_dataset(drawn), path, small_config, device="cpu", backend="plain", force=True)
    with FeatureStore(path) as store:
        assert [store.provenance[kind]["backend"] for kind in KINDS] == ["plain", "plain"]


@needs_openvino
def test_rows_that_join_by_another_backend_are_told_and_named(drawn, small_config, tmp_path, told):
    path = tmp_path / "s.h5"
    dataset = read_dataset(drawn)
    extract(dataset.first(40), path, small_config, device="cpu", backend="openvino")
    told.clear()
    extract(dataset, path, small_config, device="cpu", backend="eager")
    for kind in KINDS:
        assert (
            f"the {kind} features that are there were computed by openvino, and stay: those of eager would be the same "
            "but for rounding"
        ) in told
    with FeatureStore(path) as store:
        for kind in KINDS:
            assert store.provenance[kind]["backend"] == "openvino, eager"
            assert store.provenance[kind]["openvino"]
