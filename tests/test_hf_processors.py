"""Image processors of Hugging Face: what of an image they show, and the kinds that are refused at once."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from onceover.extract.encoders import EncoderError
from onceover.extract.encoders.huggingface import _processed
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.shown import resized_and_cropped

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE_32 = {"height": 32, "width": 32}
SQUARE_64 = {"height": 64, "width": 64}


def noise(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def processor_of(name, **settings):
    """An image processor of transformers, where this release has it."""
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    return getattr(transformers, name)(**settings)


@pytest.fixture
def vit_with(tmp_path):
    """The specification of a ViT of 32 pixels with random weights and the given image processor."""

    def save(processor):
        transformers.ViTConfig(**SMALL, image_size=32, patch_size=16).save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        return f"hf:{tmp_path}@random"

    return save


@pytest.fixture
def timm_model(tmp_path):
    """A model of timm with random weights, as the hub has it, and its specification."""

    pytest.importorskip("timm")

    def save(architecture, **preprocessing):
        if not hasattr(transformers, "TimmWrapperModel"):
            pytest.skip("this transformers has no models of timm")
        torch.manual_seed(0)
        config = transformers.TimmWrapperConfig(architecture=architecture, pretrained_cfg=preprocessing)
        model = transformers.TimmWrapperModel(config).eval()
        model.save_pretrained(tmp_path)
        return model, f"hf:{tmp_path}"

    return save


@pytest.mark.parametrize(
    ("name", "settings", "resized", "cropped"),
    [
        ("ViTImageProcessor", {"size": SQUARE_32}, 32, 0),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": SQUARE_32}, 32, 32),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 73}, "crop_size": SQUARE_64}, 73, 64),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}, 256, 224),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, 384, 0),
        ("LevitImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}, 64, 56),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 256, 224),
        ("DeiTImageProcessor", {"size": {"height": 256, "width": 256}}, 256, 224),
        ("EfficientNetImageProcessor", {"size": {"height": 100, "width": 100}}, 100, 0),
        ("CLIPImageProcessor", {"do_resize": False, "crop_size": SQUARE_64}, 0, 64),
        ("Owlv2ImageProcessor", {"size": SQUARE_64}, 64, 0),
    ],
)
def test_what_a_processor_resizes_to_and_cuts_out_is_measured(name, settings, resized, cropped):
    processor = processor_of(name, **settings)
    assert resized_and_cropped(partial(_processed, processor)) == (resized, cropped)


def test_a_crop_that_the_settings_do_not_speak_of_has_views_of_the_whole_image(tmp_path):
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 64})
    assert not getattr(processor, "do_center_crop", False)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1])
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = ImageEncoder(f"hf:{tmp_path}@random", views=4, device="cpu")
    assert encoder.recipe["short_side"] == int(64 / (224 / 256))
    assert encoder.recipe["views"] == [[None, False], [None, True], ["whole", False], ["whole", True]]
    wide = noise((160, 90))
    shown = encoder.pixels(wide)[1]
    square = processor(wide.resize((64, 64), Image.Resampling.BICUBIC), do_resize=False, return_tensors="pt")
    torch.testing.assert_close(encoder.preprocessing.scaled(shown[None])[0], square["pixel_values"][0])


@pytest.mark.parametrize(
    ("architecture", "preprocessing"),
    [
        ("test_vit", {"input_size": [3, 160, 160], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}),
        ("test_resnet", {"input_size": [3, 64, 64], "crop_pct": 0.875, "interpolation": "bilinear"}),
    ],
)
def test_a_model_of_timm_gives_its_own_pooled_output(timm_model, architecture, preprocessing):
    model, spec = timm_model(architecture, **preprocessing)
    encoder = ImageEncoder(spec, views=4, device="cpu")
    side = preprocessing["input_size"][1]
    assert encoder.recipe["pooling"] == "pooled output"
    assert encoder.recipe["preprocessing"]["input_size"] == preprocessing["input_size"]
    assert encoder.recipe["short_side"] == int(side / preprocessing["crop_pct"])
    assert len(encoder.recipe["views"]) == 4
    image = noise((200, 130))
    inputs = transformers.AutoImageProcessor.from_pretrained(spec.removeprefix("hf:"))(image)
    with torch.inference_mode():
        expected = model(**inputs).pooler_output[0]
    features = encoder.encode(encoder.pixels(image)[None])[0]
    np.testing.assert_allclose(features[0], expected.numpy(), rtol=1e-3, atol=1e-4)
    assert not np.allclose(features[0], features[2])


def test_trap_patches_of_any_aspect_are_refused_when_the_encoder_is_made(vit_with):
    spec = vit_with(processor_of("Siglip2ImageProcessor", max_num_patches=16))
    with pytest.raises(EncoderError) as error:
        ImageEncoder(spec, device="cpu")
    assert str(error.value) == (
        f"{spec}: its image processor makes pixel_values, pixel_attention_mask, spatial_shapes, patches or tiles of an "
        "image and not one image of a fixed size; use a model of a fixed size (of SigLIP 2 one without naflex in its "
        "name)"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 32, "longest_edge": 64}},
        {"size": {"shortest_edge": 20, "longest_edge": 32}, "pad_size": SQUARE_32},
    ],
    ids=["of two sizes", "filled up"],
)
def test_trap_a_processor_that_keeps_the_aspect_is_refused_when_the_encoder_is_made(vit_with, settings):
    spec = vit_with(transformers.DetrImageProcessor(**settings))
    with pytest.raises(EncoderError) as error:
        ImageEncoder(spec, device="cpu")
    assert str(error.value) == (
        f"{spec}: its image processor keeps the aspect, so that images differ in size; use a model whose processor "
        "makes all images one size, or the same backbone by timm:NAME or torchvision:NAME"
    )


def test_trap_a_processor_that_cuts_tiles_is_refused_when_the_encoder_is_made(vit_with):
    tiles = {"image_grid_pinpoints": [[64, 32], [32, 64]], "size": {"shortest_edge": 32}, "crop_size": SQUARE_32}
    spec = vit_with(transformers.LlavaNextImageProcessor(**tiles))
    with pytest.raises(EncoderError) as error:
        ImageEncoder(spec, device="cpu")
    assert str(error.value).startswith(f"{spec}: its image processor makes pixel_values, image_sizes, patches or tiles")


def test_trap_a_processor_of_another_size_than_the_model_takes_is_one_line(vit_with):
    spec = vit_with(transformers.ViTImageProcessor(size={"height": 48, "width": 48}))
    with pytest.raises(EncoderError) as error:
        ImageEncoder(spec, device="cpu")
    assert str(error.value).startswith(f"{spec}: the folder holds no usable model (")
    assert str(error.value).isprintable()
