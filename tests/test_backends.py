"""Backends: features stay what they were, what would change them is left alone, and another package adds one."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch import nn

from onceover.base.registry import RegistryError
from onceover.extract.backends import BACKENDS, _mkl, agree
from onceover.extract.backends._mkl import fuse_blocks, mkl_keeps_up, optimise, use_onednn, use_winograd
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


def on_a_processor(monkeypatch, name, capability, mkl=True):
    """As torch would describe another processor."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(_mkl, "cpu_capabilities", lambda: {"cpu_name": name} if name else {})


@pytest.mark.parametrize(
    ("name", "capability", "mkl", "expected"),
    [
        ("AMD EPYC 7763", "AVX2", True, True),
        ("Intel Xeon", "AVX512", True, True),
        ("AMD EPYC 9654", "AVX512", True, False),
        ("", "AVX512", True, False),
        ("Neoverse V1", "SVE256", False, False),
    ],
)
def test_products_are_left_to_mkl_where_it_keeps_up_with_onednn(monkeypatch, name, capability, mkl, expected):
    on_a_processor(monkeypatch, name, capability, mkl)
    assert mkl_keeps_up() == expected
    linear, convolution = nn.Linear(4, 3), nn.Conv2d(128, 128, 3, padding=1)
    use_onednn(linear)
    use_winograd(convolution)
    assert ("forward" in vars(linear)) == (not expected)
    assert ("forward" in vars(convolution)) == expected


def test_linear_layers_through_onednn_give_the_same_products(monkeypatch):
    on_a_processor(monkeypatch, "AMD EPYC 9654", "AVX512")
    model = nn.Sequential(nn.Linear(40, 30), nn.GELU(), nn.Linear(30, 20, bias=False)).eval().requires_grad_(False)
    rows = torch.randn(3, 7, 40)
    before = model(rows)
    use_onednn(model)
    torch.testing.assert_close(model(rows), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(rows.transpose(0, 1)), before.transpose(0, 1), rtol=1e-4, atol=1e-5)
    half = nn.Linear(4, 3).bfloat16()
    use_onednn(half)
    assert "forward" not in vars(half)
    assert "forward" in vars(model[0])


@pytest.fixture
def avx2(monkeypatch):
    on_a_processor(monkeypatch, "AMD EPYC 7763", "AVX2")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(28, 28), (14, 14), (7, 7), (12, 23)])
@torch.inference_mode()
def test_winograds_convolutions_put_out_the_same_but_for_rounding(avx2, size, bias):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(130, 128, 3, padding=1, bias=bias)
    batch = torch.randn(7, 130, *size, generator=generator)  # at 28x28, a block of five images and one of two
    expected = copy.deepcopy(layer).double()(batch.double())
    use_winograd(layer)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        found = layer(batch.contiguous(memory_format=memory_format))
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert found.shape == expected.shape
        assert 0 < (found - expected).abs().max() < 1e-4 * expected.std()


@torch.inference_mode()
def test_an_image_that_tiles_would_cover_half_more_than_once_is_convolved(avx2):
    layer = nn.Conv2d(128, 128, 3, padding=1)
    batch = torch.randn(2, 128, 5, 5)  # 64 pixels in tiles, 25 in the image
    expected = layer(batch)
    use_winograd(layer)
    assert "forward" in vars(layer)
    assert torch.equal(layer(batch), expected)


def test_other_convolutions_are_left_alone(avx2):
    def taken(*sizes, dtype=torch.float32, **options):
        layer = nn.Conv2d(*sizes, **({"padding": 1} | options)).to(dtype)
        use_winograd(layer)
        return "forward" in vars(layer)

    assert taken(128, 128, 3)
    for options in (
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"dtype": torch.bfloat16},
    ):
        assert not taken(256, 256, 3, **options), options
    assert not taken(64, 128, 3)
    assert not taken(128, 64, 3)
    assert not taken(128, 128, 1, padding=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@torch.inference_mode()
def test_fused_blocks_put_out_the_same(name):
    from torchvision import models

    torch.manual_seed(0)
    model = with_statistics(models.get_model(name, weights=None)).to(memory_format=torch.channels_last)
    pixels = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    fuse_blocks(model)
    assert "forward" not in vars(model.layer1[0]), "its norms are not folded yet"
    fold_batch_norms(model, lambda: model(pixels))
    before, given = model(pixels), pixels.clone()
    fuse_blocks(model, ["layer2.1.conv1", "layer3"])
    assert "forward" in vars(model.layer1[0])
    assert "forward" in vars(model.layer3[0])
    assert "forward" not in vars(model.layer2[1])
    torch.testing.assert_close(model(pixels), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(pixels, given)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.inference_mode()
def test_a_whole_model_in_all_the_faster_ways_puts_out_the_same(avx2, name):
    from torchvision import models

    torch.manual_seed(0)
    model = with_statistics(models.get_model(name, weights=None)).to(memory_format=torch.channels_last)
    pixels = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    fold_batch_norms(model, lambda: model(pixels[:1]))
    before = model(pixels)
    optimise(model, lambda: model(pixels[:1]))
    replaced = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert {"layer1.0", "layer2.1", "layer2.1.conv2"} <= replaced
    assert "layer1.1.conv2" not in replaced, "it has 64 channels"
    found = model(pixels)
    assert 0 < (found - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("fault", ["other features", "not finite"])
@torch.inference_mode()
def test_trap_a_faster_way_that_changes_features_or_hides_what_is_not_finite_is_given_up(avx2, fault, monkeypatch):
    """oneDNN's ReLU makes 0 of NaN, so that fused blocks put out features where the model has none."""
    from torchvision import models

    model = with_statistics(models.resnet18(weights=None))
    pixels = torch.randn(1, 3, 64, 64)
    fold_batch_norms(model, lambda: model(pixels))
    if fault == "not finite":
        model.conv1.weight[0] = float("nan")
    else:
        monkeypatch.setattr(_mkl, "_residual", lambda _downsample, layers, batch: layers[0](batch))
    expected = model(pixels)
    optimise(model, lambda: model(pixels))
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(model(pixels), expected, rtol=0, atol=0, equal_nan=True)


SHUFFLENET = "torchvision:shufflenet_v2_x0_5@random"
CAPTIONS = ["A red circle .", "On the left there is a blue star ."]


def check_contract(name, text_spec):
    """Checks a backend by its features, which are the plain model's but for rounding."""
    image = Image.linear_gradient("L").convert("RGB")
    features = {}
    for backend in ("plain", name):
        encoder = ImageEncoder(SHUFFLENET, layers="stage3, last", views=2, device="cpu", backend=backend)
        pixels = torch.stack([encoder.pixels(image.rotate(angle)) for angle in (0, 90, 200)])
        features[backend] = torch.from_numpy(encoder.encode(pixels))
        with ThreadPoolExecutor(3) as pool:
            for row, alone in enumerate(pool.map(encoder.encode, pixels.split(1))):
                assert agree(torch.from_numpy(alone[0]), features[backend][row])
    assert features[name].shape == (3, 2, 96 + 1024)
    assert agree(features[name], features["plain"])
    for layers in ("auto", "last"):
        texts = {}
        for backend in ("plain", name):
            encoder = TextEncoder(text_spec, layers=layers, device="cpu", backend=backend)
            texts[backend] = torch.from_numpy(encoder.encode(CAPTIONS)[0])
        assert agree(texts[name], texts["plain"])
    half = ImageEncoder(SHUFFLENET, dtype="bfloat16", device="cpu", backend=name)
    assert torch.from_numpy(half.encode(half.pixels(image)[None])).isfinite().all()


@pytest.mark.parametrize("name", BACKENDS.names())
def test_a_registered_backend_keeps_the_contract(name, tiny_bert):
    check_contract(name, f"hf:{tiny_bert}")


def test_a_backend_changes_no_fingerprint():
    recipes = [ImageEncoder(SHUFFLENET, device="cpu", backend=name).recipe for name in BACKENDS.names()]
    assert all(recipe == recipes[0] for recipe in recipes)


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

def text(network, device, dtype):
    compute = plain.text(network, device, dtype)

    def features(inputs):
        batches.append(len(inputs["input_ids"]))
        return compute(inputs)

    return features
"""


def test_another_package_adds_a_backend(outside, tiny_bert):
    outside("onceover.backends", "counting", COUNTING)
    assert "counting" in BACKENDS.names()
    check_contract("counting", f"hf:{tiny_bert}")
    batches = BACKENDS.load("counting").batches
    batches.clear()
    encoder = ImageEncoder(SHUFFLENET, views=2, device="cpu", backend="counting")
    encoder.encode(torch.stack([encoder.pixels(Image.new("RGB", (50, 40)))] * 3))
    assert batches == [3, 3], "a pass per view"
