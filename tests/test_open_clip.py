"""Models of open_clip: both towers, tokens, checkpoints, the zero-shot row, and what is refused."""

import itertools
import json
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import onceover
from onceover import workflows
from onceover.base.extras import MissingPackageError
from onceover.configs.schema import Config, ExtractConfig, FinetuneConfig, ModelConfig, TrainingConfig
from onceover.extract.encoder_checks import check_vocabulary
from onceover.extract.encoders import EncoderError
from onceover.extract.encoders import open_clip as library
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder
from onceover.heads import finetune_loop
from onceover.heads.unfreeze import UnfreezeError
from onceover.retrieval.metrics import quality

open_clip = pytest.importorskip("open_clip")

CAPTIONS = ["A red circle .", "On the left there is a blue star .", "", "star " * 300, "Hund über Hürde 🐕"]


def picture():
    numbers = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def feature(encoder):
    return encoder.encode(encoder.pixels(picture())[None])[0, 0]


def refusal(spec, encoder=ImageEncoder):
    with pytest.raises(EncoderError) as raised:
        encoder(spec, device="cpu")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's settings and weights, as open_clip saves a model."""
    import safetensors.torch

    folder = tmp_path_factory.mktemp("open_clip") / "tiny"
    library.write_example(folder)
    torch.manual_seed(1)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def known(folder, tmp_path_factory):
    """The name of the tiny model's settings, as one of those that open_clip knows."""
    configs = tmp_path_factory.mktemp("configs")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (configs / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(configs)
    return "tiny-test"


def loaded(folder):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess


def test_both_towers_give_what_open_clip_gives(folder):
    model, preprocess = loaded(folder)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images = ImageEncoder(f"open_clip:{folder}", device="cpu")
    texts = TextEncoder(f"open_clip:{folder}", device="cpu")
    with torch.no_grad():
        image = model.encode_image(preprocess(picture())[None])[0].numpy()
        text = model.encode_text(tokenizer(CAPTIONS)).numpy()
    np.testing.assert_allclose(feature(images), image, rtol=1e-5, atol=1e-5)
    features, truncated = texts.encode(CAPTIONS)
    np.testing.assert_allclose(features, text, rtol=1e-5, atol=1e-5)
    assert truncated.tolist() == [False, False, False, True, False]
    assert images.recipe["weights"] == texts.recipe["weights"]
    assert images.recipe["pooling"] == texts.recipe["pooling"] == "projection"
    assert texts.recipe["max_length"] == 40


def test_captions_that_are_cut_earlier_are_filled_up_to_the_length_of_the_model(folder):
    model, _ = loaded(folder)
    encoder = TextEncoder(f"open_clip:{folder}", max_length=5, device="cpu")
    tokens = torch.zeros(1, 40, dtype=torch.long)
    tokens[0, :5] = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS[1], context_length=5)
    with torch.no_grad():
        expected = model.encode_text(tokens).numpy()
    features, truncated = encoder.encode(CAPTIONS[1:2])
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
    assert truncated.tolist() == [True]


def test_pixels_and_their_numbers_are_what_open_clips_transform_gives(folder):
    _, preprocess = loaded(folder)
    encoder = ImageEncoder(f"open_clip:{folder}", device="cpu")
    pixels = encoder.preprocessing.preprocess(picture())
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(encoder.preprocessing.scaled(pixels[None])[0], preprocess(picture()), rtol=0, atol=1e-6)
    assert encoder.short_side == 32


def test_stored_files_of_the_tokenizer_are_enough(folder, monkeypatch):
    encoder = TextEncoder(f"open_clip:{folder}", device="cpu")
    assert list(encoder.tokenizer_files) == ["merges.txt"]
    monkeypatch.setattr(open_clip.tokenizer, "default_bpe", lambda: "/nowhere")
    again = TextEncoder(f"open_clip:{folder}", tokenizer_files=encoder.tokenizer_files, device="cpu")
    assert again.recipe == encoder.recipe
    assert again.tokenize(CAPTIONS)[0] == encoder.tokenize(CAPTIONS)[0]


def test_a_tokenizer_of_transformers(folder, tmp_path, tiny_bert):
    import shutil

    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "bert", "tokenizer_kwargs": {"clean": "lower"}}
    for file in tiny_bert.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    shutil.copy(folder / "open_clip_model.safetensors", tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    encoder = TextEncoder(f"open_clip:{tmp_path}", device="cpu")
    model, _ = loaded(tmp_path)
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS)).numpy()
    np.testing.assert_allclose(encoder.encode(CAPTIONS)[0], expected, rtol=1e-5, atol=1e-5)
    assert "tokenizer.json" in encoder.tokenizer_files
    unknown, tokens = encoder.unknown_tokens(encoder.tokenize(["a dog 狗", "a"])[0])
    assert unknown.tolist() == [1, 0]
    assert tokens.tolist() == [3, 1]
    assert encoder.tokenizer.size == len(encoder.tokenizer.wrapped.tokenizer)
    again = TextEncoder(f"open_clip:{tmp_path}", tokenizer_files=encoder.tokenizer_files, device="cpu")
    np.testing.assert_array_equal(again.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert "wants code of its own, which is never run" in refusal(f"open_clip:{tmp_path}", TextEncoder)


def test_clips_own_tokenizer_knows_every_byte_and_its_size_is_that_of_the_model(folder):
    encoder = TextEncoder(f"open_clip:{folder}", device="cpu")
    assert encoder.tokenizer.size == encoder.vocabulary == 49408
    unknown, tokens = encoder.unknown_tokens(encoder.tokenize(["a dog", "", "🐕"])[0])
    assert unknown.tolist() == [0, 0, 0]
    assert tokens.tolist()[:2] == [2, 0]
    encoder.vocabulary = 3 * 49408
    with pytest.raises(EncoderError, match="its tokenizer has 49,408 entries, and its model knows 148,224"):
        check_vocabulary(encoder, "open_clip:x")


@pytest.mark.parametrize("form", ["bare", "trained"])
def test_a_checkpoint_of_a_known_model(folder, known, tmp_path, form):
    model, _ = loaded(folder)
    weights = model.state_dict()
    file = tmp_path / "epoch_3.pt"
    if form == "trained":  # as open_clip's own training writes it
        wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
        weights = {"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}}}
    torch.save(weights, file)
    encoder = ImageEncoder(f"open_clip:{known}@{file}", device="cpu")
    np.testing.assert_allclose(feature(encoder), feature(ImageEncoder(f"open_clip:{folder}", device="cpu")), atol=1e-6)


def test_a_checkpoint_of_another_model_and_a_pickle_of_objects_are_named(folder, known, tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"visual.conv1.weight": torch.ones(1)}, file)
    message = refusal(f"open_clip:{known}@{file}")
    assert f"{file} holds the weights of another model (" in message
    assert message.endswith("name the model that it is of")
    torch.save({"state_dict": {"a": Image.new("RGB", (1, 1))}}, file)
    assert "holds Python objects other than tensors, which are not run" in refusal(f"open_clip:{known}@{file}")


def test_what_is_saved_is_a_folder_that_open_clip_reads_too(folder, known, tmp_path):
    for kind, encoder in (("image", ImageEncoder), ("text", TextEncoder)):
        plain = encoder(f"open_clip:{known}@random", seed=4, device="cpu", plain=True)
        assert plain.save(tmp_path / kind) == f"open_clip:{tmp_path / kind}"
        model, _ = loaded(tmp_path / kind)
        for name, tensor in plain.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)


def test_an_unknown_model_tag_or_folder_is_named(folder, tmp_path):
    assert "near are ViT-B-32" in refusal("open_clip:ViT-B-33@openai")
    message = refusal("open_clip:ViT-B-32@openia")
    assert "'openia' is neither a file nor one of its weights; write open_clip:ViT-B-32@ and one of" in message
    assert "laion2b_s34b_b79k" in message
    assert "it does not say which weights; write open_clip:ViT-B-32@ and one of openai" in refusal("open_clip:ViT-B-32")
    assert "the folder has no open_clip_config.json" in refusal(f"open_clip:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    assert f"write open_clip:{tmp_path}@random" in refusal(f"open_clip:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text("[]")
    assert "does not describe a model of open_clip" in refusal(f"open_clip:{tmp_path}")


def test_trap_weights_of_another_activation_are_refused():
    assert "write open_clip:ViT-B-32-quickgelu@openai" in refusal("open_clip:ViT-B-32@openai")


def test_weights_that_are_not_here_are_an_error_within_seconds_that_names_the_ways_out(unplugged):
    start = time.monotonic()
    message = refusal("open_clip:ViT-B-32@laion2b_s34b_b79k")
    assert "the weights are not in the Hugging Face cache, and laion/CLIP-ViT-B-32-laion2B-s34B-b79K cannot" in message
    assert "name a local copy (open_clip:ViT-B-32@FILE) or use open_clip:ViT-B-32@random, untrained" in message
    message = refusal("open_clip:ViT-B-16-SigLIP@random", TextEncoder)
    assert "its tokenizer's files are not in the Hugging Face cache" in message
    assert "the settings of its text tower are not" in refusal("open_clip:roberta-ViT-B-32@random")
    assert time.monotonic() - start < 10


def test_a_file_takes_the_preprocessing_on_which_all_tags_of_its_model_agree():
    from onceover.extract.encoders import parse_spec

    def preprocessing(text):
        return library._tag_preprocessing(open_clip, parse_spec(text))

    siglip = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    assert preprocessing("open_clip:ViT-B-16-SigLIP@x.pt") == siglip
    assert preprocessing("open_clip:ViT-L-14@x.pt") is None  # some tags scale as OpenAI did, some as Inception
    assert preprocessing("open_clip:ViT-L-14@laion2b_s32b_b82k")["mean"] == (0.5,) * 3


def test_without_open_clip_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingPackageError) as raised:
        ImageEncoder(f"open_clip:{folder}", device="cpu")
    assert str(raised.value).startswith(f"open_clip:{folder} needs the package open_clip_torch (")
    assert str(raised.value).endswith("pip install 'onceover-retrieval[open_clip]'")


def test_a_dataset_is_encoded_measured_searched_and_fine_tuned(drawn, folder, tmp_path, monkeypatch):
    better = itertools.count(1.0)
    spec = f"open_clip:{folder}"
    extract = ExtractConfig(image_encoder=spec, text_encoder=spec, views=1, text_layers="last", batch_size=8)
    config = Config(
        extract,
        ModelConfig(embedding_dim=16),
        TrainingConfig(num_epochs=5, batch_size=16, refit=False),
        finetune=FinetuneConfig(num_epochs=1, batch_size=16),
    )
    store = onceover.extract_features(drawn, tmp_path / "s.h5", config=extract, device="cpu")
    run = onceover.fit(store, tmp_path / "run", config, device="cpu")
    assert "zero_shot" in onceover.evaluate(run, device="cpu").result["models"]
    assert len(onceover.search(run, "a red circle", device="cpu")) == 5
    options = {"unfreeze": "image.last1", "device": "cpu"}
    with pytest.raises(UnfreezeError, match="cannot be cut at visual.transformer.resblocks.0.*add --no-cache"):
        workflows.finetune(run, drawn, store, tmp_path / "cut", config, **options)
    monkeypatch.setattr(finetune_loop, "quality", lambda *vectors: quality(*vectors) | {"rsum": next(better)})
    tuned = workflows.finetune(run, drawn, store, tmp_path / "tuned", config, cached=False, **options)
    saved = sorted(path.name for path in (tmp_path / "tuned" / "encoders" / "image").iterdir())
    assert saved == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert tuned["weights"]["image"] != tuned["base"]["recipes"]["image"]["weights"]
