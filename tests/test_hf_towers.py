"""What of a Hugging Face model becomes the feature, against what transformers itself computes."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from onceover.extract.encoders import EncoderError, TextModel
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.layers import text_pooling
from onceover.extract.encoding.stored import stored_encoder
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.encoding.vocabulary import dataset_tokenizer

CAPTIONS = ["A red circle .", "On the left there is a blue star , and on the right a ring .", "a ring"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer():
    return dataset_tokenizer(CAPTIONS)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Saves a model with a tokenizer, or with a processor for images of 32 pixels; returns its specification."""

    def save(model, own_tokenizer=None, processor=None, name="model"):
        folder = tmp_path / name
        model.save_pretrained(folder)
        (own_tokenizer or tokenizer).save_pretrained(folder)
        processor = processor or transformers.ViTImageProcessor(size={"height": 32, "width": 32})
        processor.save_pretrained(folder)
        return f"hf:{folder}"

    return save


@pytest.fixture
def make(tokenizer):
    """Makes a model with seeded random weights, by the names of its class and of its configuration's."""

    def model_of(name, config, **settings):
        if not hasattr(transformers, name):
            pytest.skip(f"this transformers has no {name}")
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()

    return model_of


def text_settings(tokenizer):
    special = {"bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}
    ids = {f"{name}_token_id": number for name, number in special.items()}
    return {**SMALL, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}


def image_feature(spec):
    """The feature of an image, and the pixels that transformers' own model takes."""
    image = Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 50).convert("RGB")
    encoder = ImageEncoder(spec, device="cpu")
    pixels = encoder.pixels(image)
    return encoder, encoder.encode(pixels[None])[0, 0], encoder.preprocessing.scaled(pixels)


def alone(tokenizer, model, read):
    """``read`` of the model's output for each caption alone, so that nothing is padded."""
    features = []
    for caption in CAPTIONS:
        with torch.inference_mode():
            inputs = tokenizer([caption], return_tensors="pt", return_token_type_ids=False)
            features.append(read(model(**inputs))[0].numpy())
    return np.stack(features)


def assert_close(features, expected):
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def qwen3(make, tokenizer):
    settings = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": LENGTH}
    return make("Qwen3Model", "Qwen3Config", **SMALL, **settings, vocab_size=len(tokenizer))


def gpt2(make, tokenizer):
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    return make("GPT2Model", "GPT2Config", **settings, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize("family", [gpt2, qwen3])
def test_a_causal_model_gives_its_last_token_whatever_side_the_tokenizer_pads(make, saved, tokenizer, family):
    model = family(make, tokenizer)
    expected = alone(tokenizer, model, lambda output: output.last_hidden_state[:, -1])
    for side in ("left", "right"):
        own = dataset_tokenizer(CAPTIONS)
        own.padding_side = side
        spec = saved(model, own, name=side)
        for pooling in ("auto", "last"):
            encoder = TextEncoder(spec, pooling=pooling, device="cpu")
            assert encoder.recipe["pooling"] == "last"
            assert_close(encoder.encode(CAPTIONS)[0], expected)


def test_an_explicit_mean_of_a_causal_model_is_honoured(make, saved, tokenizer):
    model = qwen3(make, tokenizer)
    encoder = TextEncoder(saved(model), pooling="mean", device="cpu")
    assert encoder.recipe["pooling"] == "mean"
    assert_close(encoder.encode(CAPTIONS)[0], alone(tokenizer, model, lambda output: output.last_hidden_state.mean(1)))


def test_trap_the_first_token_of_a_causal_model_has_seen_nothing(make, saved, tokenizer):
    with pytest.raises(EncoderError) as error:
        TextEncoder(saved(qwen3(make, tokenizer)), pooling="cls", device="cpu")
    assert str(error.value) == (
        "the first token of a causal text encoder has seen none of the others; set extract.text_pooling to last"
    )


def test_hidden_layers_of_a_causal_model_are_pooled_by_the_last_token_too(make, saved, tokenizer):
    model = gpt2(make, tokenizer)
    encoder = TextEncoder(saved(model), layers="1,last", device="cpu")
    with torch.inference_mode():
        inputs = tokenizer(CAPTIONS[:1], return_tensors="pt", return_token_type_ids=False)
        output = model(**inputs, output_hidden_states=True)
    expected = torch.cat([output.hidden_states[1][:, -1], output.last_hidden_state[:, -1]], dim=1)
    assert_close(encoder.encode(CAPTIONS)[0][:1], expected.numpy())


def test_a_caption_without_any_token_has_a_feature(make, saved, tokenizer):
    from tokenizers import processors

    bare = dataset_tokenizer(CAPTIONS)
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    features, _ = TextEncoder(saved(gpt2(make, tokenizer), bare), device="cpu").encode(["", "a ring"])
    assert np.isfinite(features).all()
    assert features[0].any()


def test_a_model_that_sees_both_ways_is_pooled_by_the_mean_as_before(tiny_bert):
    encoder = TextEncoder(f"hf:{tiny_bert}", device="cpu")
    assert encoder.recipe["pooling"] == "mean"
    assert TextEncoder(f"hf:{tiny_bert}", pooling="mean", device="cpu").recipe == encoder.recipe


def test_the_choice_of_the_last_token_and_a_length_that_is_not_to_be_had_are_told(
    make, saved, tokenizer, drawn, tmp_path, run
):
    spec = saved(qwen3(make, tokenizer))
    image = ("--image-encoder", "torchvision:shufflenet_v2_x0_5@random", "--device", "cpu", "--limit", "2")
    call = ("extract", "--data", drawn, "--store", tmp_path / "s.h5", "--text-encoder", spec, *image)
    lines = run(*call, "--set", "extract.max_length=512").stderr.splitlines()
    assert (
        "text: a causal model, so a caption's feature is that of its last token; "
        "set extract.text_pooling for another pooling"
    ) in lines
    assert f"text: captions are cut at {LENGTH} tokens, the most that {spec} takes; extract.max_length is 512" in lines
    quiet = run(*call, "--text-pooling", "mean", "--force").stderr
    assert "causal" not in quiet
    assert "captions are cut at" not in quiet  # 128 is the default, and nobody's wish


def test_a_pooling_of_a_dual_encoder_is_refused_in_one_line(tiny_clip, drawn, tmp_path, fails):
    store = tmp_path / "s.h5"
    spec = f"hf:{tiny_clip}"
    call = ("extract", "--data", drawn, "--store", store, "--device", "cpu")
    assert fails(*call, "--image-encoder", spec, "--text-encoder", spec, "--text-pooling", "mean").endswith(
        "the text encoder's own projection is its feature, whatever the setting; leave extract.text_pooling at auto"
    )
    assert not store.exists()


def test_features_of_a_dual_encoder_that_an_earlier_version_stored_are_encoded_again(tiny_clip):
    encoder = TextEncoder(f"hf:{tiny_clip}", device="cpu")
    settings = {"text_layers": "auto", "text_pooling": "mean", "max_length": 128}  # the default, then
    provenance = {"encoder": f"hf:{tiny_clip}", "seed": 0}
    again = stored_encoder("text", provenance, encoder.recipe, settings, encoder.tokenizer_files, "cpu")
    assert again.recipe == encoder.recipe


@pytest.mark.parametrize(
    ("name", "config", "output", "pooling"),
    [
        ("CLIPVisionModel", "CLIPVisionConfig", "pooler_output", "pooled output"),
        ("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds", "projection"),
        ("SiglipVisionModel", "SiglipVisionConfig", "pooler_output", "pooled output"),
        ("BlipVisionModel", "BlipVisionConfig", "pooler_output", "pooled output"),
        ("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", "pooler_output", "pooled output"),
    ],
)
def test_a_vision_tower_saved_alone_gives_the_feature_it_was_trained_for(make, saved, name, config, output, pooling):
    model = make(name, config, **VISION)
    encoder, feature, pixels = image_feature(saved(model))
    with torch.inference_mode():
        expected = model(pixel_values=pixels)[output][0]
    assert encoder.recipe["pooling"] == pooling
    assert_close(feature, expected.numpy())


def test_a_vision_tower_without_its_head_gives_the_mean_of_its_tokens(make, saved):
    model = make("SiglipVisionModel", "SiglipVisionConfig", **VISION, vision_use_head=False)
    encoder, feature, pixels = image_feature(saved(model))
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state[0].mean(0)
    assert encoder.recipe["pooling"] == "spatial mean"
    assert_close(feature, expected.numpy())


@pytest.mark.parametrize(("name", "config"), [("ViTModel", "ViTConfig"), ("FlavaImageModel", "FlavaImageConfig")])
def test_a_pooler_that_may_never_have_been_trained_is_not_used(make, saved, name, config):
    model = make(name, config, **VISION)
    encoder, feature, pixels = image_feature(saved(model))
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state[0, 0]
    assert encoder.recipe["pooling"] == "cls token"
    assert_close(feature, expected.numpy())


def test_both_towers_of_clip_saved_alone_give_what_the_whole_gives(tiny_clip, tmp_path):
    whole = transformers.CLIPModel.from_pretrained(tiny_clip)
    configs = {"Vision": whole.config.vision_config, "Text": whole.config.text_config}
    for kind, config in configs.items():
        config.projection_dim = whole.config.projection_dim
        tower = getattr(transformers, f"CLIP{kind}ModelWithProjection")(config)
        tower.load_state_dict({name: whole.state_dict()[name] for name in tower.state_dict()})
        tower.save_pretrained(tmp_path / kind)
        transformers.AutoImageProcessor.from_pretrained(tiny_clip).save_pretrained(tmp_path / kind)
        transformers.AutoTokenizer.from_pretrained(tiny_clip).save_pretrained(tmp_path / kind)
    _, feature, _ = image_feature(f"hf:{tmp_path / 'Vision'}")
    assert_close(feature, image_feature(f"hf:{tiny_clip}")[1])
    text = TextEncoder(f"hf:{tmp_path / 'Text'}", layers="auto", device="cpu")
    assert_close(text.encode(CAPTIONS)[0], TextEncoder(f"hf:{tiny_clip}", device="cpu").encode(CAPTIONS)[0])


@pytest.mark.parametrize(
    ("name", "output", "pooling"),
    [("CLIPTextModel", "pooler_output", "last"), ("CLIPTextModelWithProjection", "text_embeds", "projection")],
)
def test_a_text_tower_of_clip_saved_alone_gives_its_end_token(make, saved, tokenizer, name, output, pooling):
    model = make(name, "CLIPTextConfig", **text_settings(tokenizer), projection_dim=24)
    encoder = TextEncoder(saved(model), device="cpu")
    assert encoder.recipe["pooling"] == pooling
    assert_close(encoder.encode(CAPTIONS)[0], alone(tokenizer, model, lambda found: found[output]))


def test_a_text_tower_of_siglip_saved_alone_gives_the_last_position_of_its_full_length(make, saved):
    own = dataset_tokenizer(CAPTIONS)
    own.model_max_length = 24
    model = make(
        "SiglipTextModel",
        "SiglipTextConfig",
        **text_settings(own) | {"max_position_embeddings": 24},
        projection_size=20,
    )
    encoder = TextEncoder(saved(model, own), layers="auto", device="cpu")
    with torch.inference_mode():
        inputs = own(CAPTIONS, padding="max_length", return_tensors="pt")["input_ids"]
        expected = model(input_ids=inputs).pooler_output
    assert (encoder.recipe["pooling"], encoder.recipe["layers"]) == ("projection", ["last"])
    assert_close(encoder.encode(CAPTIONS)[0], expected.numpy())


def test_a_text_tower_that_is_compared_by_its_first_token_gives_that(make, saved, tokenizer):
    model = make("AlignTextModel", "AlignTextConfig", **text_settings(tokenizer))
    encoder = TextEncoder(saved(model), device="cpu")
    assert encoder.recipe["pooling"] == "cls"
    assert_close(encoder.encode(CAPTIONS)[0], alone(tokenizer, model, lambda output: output.last_hidden_state[:, 0]))


@pytest.mark.parametrize(
    ("whole", "encoder_alone", "config"),
    [
        ("T5Model", "T5EncoderModel", "T5Config"),
        ("MT5ForConditionalGeneration", "MT5EncoderModel", "MT5Config"),
        ("UMT5Model", "UMT5EncoderModel", "UMT5Config"),
    ],
)
def test_a_t5_gives_the_same_with_and_without_its_decoder(make, saved, tokenizer, whole, encoder_alone, config):
    model = make(whole, config, **T5, vocab_size=len(tokenizer))
    spec = saved(model)
    only = getattr(transformers, encoder_alone).from_pretrained(spec.removeprefix("hf:")).eval()
    expected = alone(tokenizer, only, lambda output: output.last_hidden_state.mean(1))
    for text in (spec, saved(only, name="encoder")):
        encoder = TextEncoder(text, device="cpu")
        assert encoder.recipe["pooling"] == "mean"
        assert_close(encoder.encode(CAPTIONS)[0], expected)


def test_an_encoder_of_t5_alone_is_saved_and_loaded_again(make, saved, tokenizer, tmp_path):
    model = make("T5EncoderModel", "T5Config", **T5, vocab_size=len(tokenizer))
    encoder = TextEncoder(saved(model), device="cpu", plain=True)
    again = TextEncoder(encoder.save(tmp_path / "again"), device="cpu", plain=True)
    assert again.recipe == encoder.recipe
    np.testing.assert_array_equal(again.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])


def flava(make, tokenizer):
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    parts = {"image_config": VISION, "text_config": text, "multimodal_config": SMALL}
    return make("FlavaModel", "FlavaConfig", **parts, hidden_size=32, projection_dim=32)


@pytest.mark.filterwarnings("ignore:The .device. argument is deprecated:FutureWarning")  # transformers 4.46's own
def test_flava_is_compared_by_the_first_tokens_of_both_towers(make, saved, tokenizer):
    model = flava(make, tokenizer)
    spec = saved(model)
    encoder, feature, pixels = image_feature(spec)
    assert encoder.recipe["pooling"] == "projection"
    with torch.inference_mode():
        hidden = model.image_model(pixel_values=pixels).last_hidden_state[:, 0]
        expected = model.image_projection(hidden)[0]
    assert_close(feature, expected.numpy())
    features, _ = TextEncoder(spec, device="cpu").encode(CAPTIONS)
    expected = alone(tokenizer, model.text_model, lambda output: model.text_projection(output.last_hidden_state[:, 0]))
    assert_close(features, expected)


def test_trap_a_dual_encoder_that_gives_tokens_is_refused_when_it_is_made(make, saved, tokenizer):
    query = {**SMALL, "encoder_hidden_size": 32, "vocab_size": len(tokenizer), "use_qformer_text_input": True}
    model = make(
        "Blip2VisionModelWithProjection",
        "Blip2Config",
        vision_config=VISION,
        qformer_config=query,
        num_query_tokens=5,
        image_text_hidden_size=24,
    )
    spec = saved(model)
    with pytest.raises(EncoderError) as error:
        ImageEncoder(spec, device="cpu")
    assert str(error.value) == (
        f"{spec} gives no single vector for each image but (5, 24); use a dual encoder that does, such as CLIP or "
        "SigLIP, or an encoder of one kind alone"
    )


@pytest.mark.parametrize(
    ("name", "config", "settings", "limit"),
    [
        ("RobertaModel", "RobertaConfig", {**SMALL, "max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ("MPNetModel", "MPNetConfig", {**SMALL, "max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ("BertModel", "BertConfig", {**SMALL, "max_position_embeddings": 34}, 34),
        ("XLNetModel", "XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, 50),
    ],
)
def test_trap_the_longest_caption_fits_whatever_a_model_says_of_its_length(
    make, saved, tokenizer, name, config, settings, limit
):
    encoder = TextEncoder(saved(make(name, config, **settings, vocab_size=len(tokenizer))), max_length=50, device="cpu")
    assert encoder.recipe["max_length"] == limit
    features, truncated = encoder.encode(["ring " * 500, "a ring"])
    assert truncated.tolist() == [True, False]
    assert np.isfinite(features).all()
    assert_close(features[1:], encoder.encode(["a ring"])[0])


def test_the_length_of_a_dual_encoder_is_that_of_its_text_tower_and_not_its_patches(make, saved, tokenizer):
    encoder = TextEncoder(saved(flava(make, tokenizer)), max_length=500, device="cpu")
    assert encoder.recipe["max_length"] == LENGTH  # the image tower has 5 positions


def test_trap_a_tokenizer_without_a_limit_leaves_it_to_the_model(make, saved, tokenizer):
    own = dataset_tokenizer(CAPTIONS)
    own.model_max_length = int(1e30)
    encoder = TextEncoder(saved(qwen3(make, tokenizer), own), max_length=500, device="cpu")
    assert encoder.recipe["max_length"] == LENGTH


def test_pooling_that_is_given_is_taken_but_for_projections():
    def model(**attributes):
        unused = dict.fromkeys(("module", "tokenizer", "states", "words", "recipe", "max_length", "depth"))
        return TextModel(**unused, **attributes)

    assert text_pooling("auto", model(), ["last"]) == "mean"
    assert text_pooling("auto", model(pooling="last", is_causal=True), ["last"]) == "last"
    assert text_pooling("last", model(), ["last", 1]) == "last"
    assert text_pooling("auto", model(is_projection=True), ["last"]) == "projection"
