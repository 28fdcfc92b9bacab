"""Image encoders of timm: features, preprocessing, checkpoints as people have them, and what is refused."""

import json
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from onceover.base.extras import MissingPackageError
from onceover.extract.encoders import EncoderError, change_stamp, parse_spec
from onceover.extract.encoding.image import ImageEncoder
from onceover.heads.unfreeze import Stages

timm = pytest.importorskip("timm")


def picture(width=250, height=180):
    numbers = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def encoder_of(spec, **options):
    return ImageEncoder(spec, device="cpu", **options)


def feature(encoder):
    return encoder.encode(encoder.pixels(picture())[None])[0, 0]


def expected(model, **settings):
    """timm's own feature of the picture: its transform, then the model without a last layer."""
    data = timm.data.resolve_data_config(settings, model=model)
    transform = timm.data.create_transform(**data, is_training=False)
    model.reset_classifier(0)
    with torch.no_grad():
        return model.eval()(transform(picture())[None])[0].numpy()


def refusal(spec):
    with pytest.raises(EncoderError) as raised:
        encoder_of(spec)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def classifier():
    """A model with its last layer, of 10 classes."""
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=10)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_feature_is_timms_before_the_classifier(name):
    torch.manual_seed(5)
    model = timm.create_model(name, num_classes=0)
    encoder = encoder_of(f"timm:{name}@random", seed=5)
    np.testing.assert_allclose(feature(encoder), expected(model), rtol=1e-5, atol=1e-5)
    assert encoder.recipe["pooling"] == "before the classifier"
    assert encoder.recipe["preprocessing"]["input_size"] == [3, 160, 160]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_pixels_and_their_numbers_are_what_timms_transform_gives(tmp_path, mode):
    folder = saved(tmp_path, crop_mode=mode, crop_pct=0.9)
    encoder = encoder_of(f"timm:{folder}", views=3)
    model = timm.create_model("test_resnet", num_classes=0)
    data = timm.data.resolve_data_config({"crop_mode": mode, "crop_pct": 0.9}, model=model)
    transform = timm.data.create_transform(**data, is_training=False)
    for size in ((60, 50), (300, 500), (500, 300)):
        pixels = encoder.preprocessing.preprocess(picture(*size))
        assert pixels.dtype == torch.uint8
        torch.testing.assert_close(encoder.preprocessing.scaled(pixels[None])[0], transform(picture(*size)))
    assert encoder.short_side == 177  # 160 / 0.9
    has_whole = ["whole", False] in encoder.recipe["views"]
    assert has_whole == (mode != "border")  # which cuts nothing off


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "model", "module"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints_as_people_have_them(tmp_path, classifier, wrapped, suffix):
    import safetensors.torch

    weights = classifier.state_dict()
    if wrapped == "module":
        weights = {f"module.{name}": tensor for name, tensor in weights.items()}
    file = tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights, file)
    else:
        torch.save({wrapped: weights, "epoch": 3} if wrapped in ("state_dict", "model") else weights, file)
    encoder = encoder_of(f"timm:test_resnet@{file}")
    np.testing.assert_allclose(feature(encoder), expected(classifier), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_a_head_and_with_the_preprocessing_of_a_tag(tmp_path, classifier):
    weights = {name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("fc.")}
    file = tmp_path / "backbone.pt"
    torch.save(weights, file)
    encoder = encoder_of(f"timm:test_resnet.r160_in1k@{file}")
    np.testing.assert_allclose(feature(encoder), expected(classifier), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_another_model_is_named(tmp_path, classifier):
    file = tmp_path / "other.pth"
    torch.save(classifier.state_dict(), file)
    assert f"{file} lacks" in refusal(f"timm:test_vit@{file}")
    torch.save(classifier.state_dict() | {"extra.weight": torch.ones(1)}, file)
    assert f"{file} holds 1 weights that test_resnet has not (the first: extra.weight)" in refusal(
        f"timm:test_resnet@{file}"
    )
    torch.save({**classifier.state_dict(), "conv1.0.weight": torch.ones(2, 2)}, file)
    assert "conv1.0.weight has the shape (2, 2)" in refusal(f"timm:test_resnet@{file}")


def saved(folder, **settings):
    """A model of 10 classes in a folder as timm saves it for the hub."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=10)
    config = {"pretrained_cfg": {**timm.data.resolve_data_config({}, model=model), **settings}}
    timm.models.save_for_hf(model, folder / "hub", model_config=config, safe_serialization=True)
    return folder / "hub"


def test_a_folder_as_timm_saves_it(tmp_path, classifier):
    folder = saved(tmp_path)
    encoder = encoder_of(f"timm:{folder}")
    np.testing.assert_allclose(feature(encoder), expected(classifier), rtol=1e-5, atol=1e-5)
    before = change_stamp(parse_spec(f"timm:{folder}"), 0)
    (folder / "model.safetensors").touch()
    assert change_stamp(parse_spec(f"timm:{folder}"), 0) != before


def test_what_is_saved_is_a_folder_that_timm_reads_too(tmp_path):
    encoder = encoder_of("timm:test_resnet@random", plain=True)
    assert encoder.save(tmp_path / "saved") == f"timm:{tmp_path / 'saved'}"
    if timm.__version__ == "1.0.20":
        pytest.skip("the oldest release that is allowed does not read safetensors by local-dir: itself")
    model = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=0)
    np.testing.assert_allclose(feature(encoder), expected(model), rtol=1e-5, atol=1e-5)


def test_folders_that_are_none_of_timms_are_named(tmp_path, tiny_bert):
    assert f"a model of Hugging Face's is hf:{tiny_bert}" in refusal(f"timm:{tiny_bert}")
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    assert f"write timm:{folder}@random" in refusal(f"timm:{folder}")
    assert encoder_of(f"timm:{folder}@random").recipe["architecture"].startswith("timm:test_resnet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "no_such_model"}))
    assert "names the model 'no_such_model', which timm" in refusal(f"timm:{folder}")


def test_an_unknown_model_or_tag_is_named_with_near_ones():
    assert "timm has no model 'resnet5o', and there is no such folder; near are resnet50" in refusal("timm:resnet5o")
    message = refusal("timm:resnet50@a1_in1")
    assert "'a1_in1' is neither a file nor one of resnet50's weights: a1_in1k" in message
    assert message.endswith("random")
    assert "is no file" in refusal("timm:resnet50.a1_in1k@nowhere.pth")


def test_weights_that_are_not_here_are_an_error_within_seconds_that_names_the_ways_out(unplugged):
    start = time.monotonic()
    for spec in ("timm:test_resnet", "timm:test_resnet@r160_in1k", "timm:test_resnet.r160_in1k"):
        message = refusal(spec)
        assert "not in the Hugging Face cache, and timm/test_resnet.r160_in1k cannot be downloaded" in message
        assert "name a local copy (timm:test_resnet@FILE) or use timm:test_resnet@random, untrained" in message
    assert time.monotonic() - start < 10
    message = refusal("timm:gcvit_base")
    assert "the weights are at https://" in message
    assert "alone; download them" in message


def test_weights_in_the_cache_need_no_network(cached_file, classifier):
    import safetensors.torch

    torch.manual_seed(3)
    model = timm.create_model("test_resnet")
    cached_file("timm/test_resnet.r160_in1k", "model.safetensors", safetensors.torch.save(model.state_dict()))
    np.testing.assert_allclose(feature(encoder_of("timm:test_resnet")), expected(model), rtol=1e-5, atol=1e-5)


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError) as raised:
        encoder_of("timm:test_resnet@random")
    message = str(raised.value)
    assert message.startswith("timm:test_resnet@random needs the package timm (")
    assert message.endswith("pip install 'onceover-retrieval[timm]'")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_last_block_alone_is_unfrozen(name):
    encoder = encoder_of(f"timm:{name}@random", plain=True)
    pixels = encoder.pixels(picture())
    stages = Stages(encoder.model, lambda: encoder.outputs(pixels))
    lowest = stages.lowest(["last1"], "image")
    depths = stages.unfreeze(lowest)
    encoder.outputs(pixels)[0].square().sum().backward()
    trained = {name for name, parameter in encoder.model.named_parameters() if parameter.grad is not None}
    assert trained == set(depths)
    assert 0 < len(trained) < len(list(encoder.model.parameters()))
