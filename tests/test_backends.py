"""Backends: features stay what they were, what would change them is left alone, and another package adds one."""

import copy
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from torch import nn

from onceover.base.registry import RegistryError
from onceover.extract.backends import BACKENDS, agree
from onceover.extract.backends.eager import fold_batch_norms
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder


def with_statistics(model):
    """Its BatchNorms as after training: statistics and weights of their own."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                tensor.data.normal_(generator=generator)
            for tensor in (module.running_var, module.weight):
                tensor.data.uniform_(0.5, 2, generator=generator)
    return model.eval().requires_grad_(False)


class Block(nn.Module):
    """Modules are registered in another order than they are used in."""

    def __init__(self, tapped=False, shared=False):
        super().__init__()
        self.second_norm, self.first_norm = nn.BatchNorm2d(5), nn.BatchNorm2d(4)
        self.second, self.first = nn.Conv2d(4, 5, 3, bias=False), nn.Conv2d(3, 4, 3)
        self.alone = nn.BatchNorm2d(3)
        self.tapped, self.shared = tapped, shared

    def forward(self, pixels):
        mapped = self.first(self.alone(pixels))
        hidden = self.first_norm(mapped).relu()
        if self.shared:
            hidden = self.first_norm(hidden)
        out = self.second_norm(self.second(hidden)).mean((2, 3))
        return out + mapped.mean() if self.tapped else out


PIXELS = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_a_norm_is_folded_into_the_convolution_it_follows_whatever_the_order_of_registration():
    model = with_statistics(Block())
    before = model(PIXELS)
    assert fold_batch_norms(model, lambda: model(PIXELS)) == 2
    torch.testing.assert_close(model(PIXELS), before, rtol=1e-4, atol=1e-5)
    assert [type(module) for module in (model.first_norm, model.second_norm, model.alone)] == [
        nn.Identity, nn.Identity, nn.BatchNorm2d,
    ]  # fmt: skip
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("oddity", ["tapped", "shared"])
def test_what_folding_would_change_is_left_as_it_was(oddity):
    model = with_statistics(Block(**{oddity: True}))
    state, before = copy.deepcopy(model.state_dict()), model(PIXELS)
    assert fold_batch_norms(model, lambda: model(PIXELS)) == 0
    assert torch.equal(model(PIXELS), before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_convolution_whose_own_output_is_asked_for_is_left_alone():
    model = with_statistics(Block())
    assert fold_batch_norms(model, lambda: model(PIXELS), ["first"]) == 1
    assert isinstance(model.first_norm, nn.BatchNorm2d)


def test_a_model_without_such_norms_is_no_error():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()).eval()
    assert fold_batch_norms(model, lambda: model(PIXELS)) == 0


def test_a_model_with_a_weight_that_is_not_finite_is_left_alone():
    model = with_statistics(Block())
    model.first.weight[0] = float("nan")
    assert fold_batch_norms(model, lambda: model(PIXELS)) == 0
    assert isinstance(model.first_norm, nn.BatchNorm2d)


def test_folding_keeps_the_features_of_whole_models():
    from torchvision import models

    for name in ("resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"):
        model = with_statistics(models.get_model(name, weights=None))
        pixels = torch.randn(1, 3, 64, 64)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        before = model(pixels)
        folded = fold_batch_norms(model, lambda: model(pixels))  # noqa: B023
        left = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert left == norms - folded
        assert folded > norms / 3, name
        assert (model(pixels) - before).abs().max() <= 1e-4 * before.abs().max()


SHUFFLENET = "torchvision:shufflenet_v2_x0_5@random"
CAPTIONS = ["A red circle .", "On the left there is a blue star ."]


def check_contract(name, image_spec, text_spec):
    """Checks a backend by its features, which are the plain model's but for rounding.

    Args:
        image_spec: of a ResNet whose first stage has 8 channels, and its last one 16.
    """
    image = Image.linear_gradient("L").convert("RGB")
    features = {}
    for backend in ("plain", name):
        encoder = ImageEncoder(image_spec, layers="encoder.stages.0, last", views=2, device="cpu", backend=backend)
        pixels = torch.stack([encoder.pixels(image.rotate(angle)) for angle in (0, 90, 200)])
        features[backend] = torch.from_numpy(encoder.encode(pixels))
        with ThreadPoolExecutor(3) as pool:
            for row, alone in enumerate(pool.map(encoder.encode, pixels.split(1))):
                assert agree(torch.from_numpy(alone[0]), features[backend][row])
    assert features[name].shape == (3, 2, 8 + 16)
    assert agree(features[name], features["plain"])
    for layers in ("auto", "last"):
        texts = {}
        for backend in ("plain", name):
            encoder = TextEncoder(text_spec, layers=layers, device="cpu", backend=backend)
            texts[backend] = torch.from_numpy(encoder.encode(CAPTIONS)[0])
        assert agree(texts[name], texts["plain"])
    half = ImageEncoder(image_spec, dtype="bfloat16", device="cpu", backend=name)
    assert torch.from_numpy(half.encode(half.pixels(image)[None])).isfinite().all()


NO_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is missing")
NAMES = [pytest.param(name, marks=NO_OPENVINO if name == "openvino" else ()) for name in BACKENDS.names()]


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_backend_keeps_the_contract(name, tiny_resnet, tiny_bert):
    check_contract(name, f"hf:{tiny_resnet}", f"hf:{tiny_bert}")


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_changes_no_fingerprint(name, tiny_clip):
    encoder = ImageEncoder(f"hf:{tiny_clip}", device="cpu", backend=name)
    assert encoder.recipe == ImageEncoder(f"hf:{tiny_clip}", device="cpu", plain=True).recipe


def test_layers_that_are_captured_again_are_recorded_once():
    """A backend that refuses a network may have captured its layers already."""
    encoder = ImageEncoder(SHUFFLENET, layers="stage3, last", device="cpu")
    sample = torch.zeros(1, 3, 64, 64)
    before = encoder._network.features(sample)
    encoder._network.capture(sample)
    assert torch.equal(encoder._network.features(sample), before)
    assert len(encoder.model.get_submodule("stage3")._forward_hooks) == 1


def test_an_unknown_backend_is_named():
    with pytest.raises(RegistryError, match="there is no backend 'eagre'; did you mean 'eager'"):
        ImageEncoder(SHUFFLENET, device="cpu", backend="eagre")


COUNTING = """
from onceover.extract.backends import plain

batches = []

def image(network, sample, device, dtype):
    compute = plain.image(network, sample, device, dtype)

    def features(batch):
        batches.append(len(batch))
        return compute(batch)

    return features

def text(network, sample, device, dtype):
    compute = plain.text(network, sample, device, dtype)

    def features(inputs):
        batches.append(len(inputs["input_ids"]))
        return compute(inputs)

    return features
"""


def test_another_package_adds_a_backend(outside, tiny_resnet, tiny_bert):
    outside("onceover.backends", "counting", COUNTING)
    assert "counting" in BACKENDS.names()
    check_contract("counting", f"hf:{tiny_resnet}", f"hf:{tiny_bert}")
    batches = BACKENDS.load("counting").batches
    batches.clear()
    encoder = ImageEncoder(SHUFFLENET, views=2, device="cpu", backend="counting")
    encoder.encode(torch.stack([encoder.pixels(Image.new("RGB", (50, 40)))] * 3))
    assert batches == [3, 3], "a pass per view"
