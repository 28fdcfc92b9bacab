"""Encoders: what they compute, that they are frozen, what their fingerprints see, and what is said when they fail."""

import errno
import json
import os
import shutil
import tempfile

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from onceover.base.files import FileError, digest
from onceover.extract.encoder_files import known_tokenizer_files, without_code
from onceover.extract.encoders import EncoderError, change_stamp, huggingface, parse_spec
from onceover.extract.encoding.devices import pick_device
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.preprocessing import views_for
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.encoding.vocabulary import dataset_tokenizer

SHUFFLENET = "torchvision:shufflenet_v2_x0_5@random"


def noise(seed=0, size=(60, 50)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def views_of(encoder, picture):
    """As the network takes them: float32 (V, 3, H, W)."""
    pixels, preprocessing = encoder.pixels(picture), encoder.preprocessing
    return preprocessing.scaled(
        torch.stack([preprocessing.view(pixels, view) for view in range(len(preprocessing.views))])
    )


@pytest.fixture(scope="module")
def image_encoder():
    return ImageEncoder(SHUFFLENET, views=5, device="cpu")


@pytest.fixture(scope="module")
def text_encoder(tiny_bert):
    return TextEncoder(f"hf:{tiny_bert}", device="cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchvision:resnet50", ("torchvision", "resnet50", "IMAGENET1K_V1", None)),
        ("torchvision:resnet50@IMAGENET1K_V2", ("torchvision", "resnet50", "IMAGENET1K_V2", None)),
        ("torchvision:resnet50@random", ("torchvision", "resnet50", "random", None)),
        ("hf:distilbert-base-uncased", ("hf", "distilbert-base-uncased", "", None)),
        ("hf:org/name#v1", ("hf", "org/name", "", "v1")),
        ("hf:distilbert-base-uncased@random", ("hf", "distilbert-base-uncased", "random", None)),
        ("hf:/a/b@c", ("hf", "/a/b@c", "", None)),
    ],
)
def test_specifications(text, expected):
    spec = parse_spec(text)
    assert (spec.library, spec.name, spec.weights, spec.revision) == expected


@pytest.mark.parametrize("text", ["", "resnet50", "keras:resnet50", "hf:", "torchvision:"])
def test_what_is_no_specification_is_named_with_the_forms(text):
    with pytest.raises(EncoderError, match=r"torchvision:NAME\[@WEIGHTS\]"):
        parse_spec(text)


def test_views_are_mirrored_and_cropped_before_the_weights_own_preprocessing(image_encoder):
    picture = noise()
    parts = image_encoder.pixels(picture)
    assert (parts.shape, parts.dtype) == ((3, 3, 224, 224), torch.uint8)  # as it is, whole, and a corner
    pixels = views_of(image_encoder, picture)
    assert pixels.shape == (5, 3, 224, 224)
    for plain, mirrored in ((0, 1), (2, 3)):
        torch.testing.assert_close(pixels[mirrored], pixels[plain].flip(-1))
    from torchvision.models import ShuffleNet_V2_X0_5_Weights
    from torchvision.transforms.functional import normalize, to_tensor

    transforms = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms()
    torch.testing.assert_close(pixels[0], transforms(picture))
    square = picture.resize((224, 224), Image.Resampling.BICUBIC)
    whole = normalize(to_tensor(square), transforms.mean, transforms.std)  # nothing is cut off
    torch.testing.assert_close(pixels[2], whole)
    assert not torch.equal(pixels[4], pixels[0])


def test_trap_pixels_and_their_numbers_are_what_the_weights_own_preprocessing_gives(image_encoder, tiny_clip, shared):
    from torchvision.models import ShuffleNet_V2_X0_5_Weights
    from transformers import AutoImageProcessor

    mobilenet = f"{shared}/encoders/mobilenet_v2_1.0_224"
    encoded = {name: ImageEncoder(f"hf:{name}", device="cpu") for name in (str(tiny_clip), mobilenet)}
    cases = [(image_encoder, ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms())]
    for name, encoder in encoded.items():
        processor = AutoImageProcessor.from_pretrained(name)
        cases.append((encoder, lambda one, processor=processor: processor(one, return_tensors="pt")["pixel_values"][0]))
    for encoder, whole in cases:
        for size in ((60, 50), (300, 500), (500, 300)):
            pixels = encoder.preprocessing.preprocess(noise(size=size))
            assert pixels.dtype == torch.uint8
            assert torch.equal(encoder.preprocessing.scaled(pixels[None])[0], whole(noise(size=size)))


def test_a_preprocessing_whose_steps_cannot_be_told_apart_is_left_whole(tiny_clip, monkeypatch):
    whole = ImageEncoder(f"hf:{tiny_clip}", views=2, device="cpu")
    processed = huggingface._processed
    monkeypatch.setattr(huggingface, "_processed", lambda processor, picture, **_steps: processed(processor, picture))
    encoder = ImageEncoder(f"hf:{tiny_clip}", views=2, device="cpu")
    pixels = encoder.pixels(noise())
    assert pixels.dtype == torch.float32
    assert encoder.recipe == whole.recipe
    np.testing.assert_array_equal(encoder.encode(pixels[None]), whole.encode(whole.pixels(noise())[None]))


def test_a_preprocessing_that_crops_nothing_has_no_view_of_the_whole_picture(tiny_clip):
    encoder = ImageEncoder(
        f"hf:{tiny_clip}", views=3, device="cpu"
    )  # resized to 32 and cropped to 32: sides are cut off
    assert encoder.recipe["views"] == [[None, False], [None, True], ["whole", False]]
    wide = noise(size=(40, 90))
    whole = views_of(encoder, wide.resize((32, 32), Image.Resampling.BICUBIC))[0]
    torch.testing.assert_close(views_of(encoder, wide)[2], whole)
    assert not torch.equal(views_of(encoder, wide)[0], whole)
    assert views_for(4, is_cropped=False) == [(None, False), (None, True)]
    assert len(views_for(12, is_cropped=False)) == 10


def test_features_are_what_stands_before_the_classifier(image_encoder):
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(0)
    model = shufflenet_v2_x0_5(weights=None).eval()
    seen = []
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = image_encoder.pixels(noise())
    with torch.inference_mode():
        model(views_of(image_encoder, noise()))
    found = image_encoder.encode(pixels[None])
    assert (found.shape, found.dtype) == ((1, 5, 1024), np.float32)
    np.testing.assert_allclose(found[0], seen[0].numpy(), rtol=1e-4, atol=1e-5)


def test_trap_frozen_encoders_are_in_eval_mode_and_do_not_depend_on_the_batch(image_encoder, text_encoder):
    for encoder in (image_encoder, text_encoder):
        assert not any(module.training for module in encoder.model.modules())
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    weights = {name: tensor.clone() for name, tensor in image_encoder.model.state_dict().items()}
    pixels = torch.stack([image_encoder.pixels(noise(seed)) for seed in range(4)])
    together = image_encoder.encode(pixels)
    alone = np.concatenate([image_encoder.encode(pixels[row : row + 1]) for row in range(4)])
    spread = together.std(0).mean()
    assert np.abs(together - alone).max() < 1e-3 * spread
    for name, tensor in image_encoder.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name  # BatchNorm statistics do not drift
    captions = ["A red circle .", "A star to the left of a very very big green square , which is further down ."]
    long, _ = text_encoder.encode(captions)
    short, _ = text_encoder.encode(captions[:1])
    np.testing.assert_allclose(long[:1], short, atol=1e-5)  # padding is masked


def test_random_weights_are_seeded_and_leave_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again = (ImageEncoder(SHUFFLENET, seed=3, device="cpu").recipe for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again != ImageEncoder(SHUFFLENET, seed=4, device="cpu").recipe


def test_text_pooling_is_the_masked_mean_or_the_first_token(tiny_bert):
    from transformers import AutoModel, AutoTokenizer

    captions = ["A red circle .", "On the left there is a blue star ."]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    for pooling in ("mean", "cls"):
        found, _ = TextEncoder(f"hf:{tiny_bert}", pooling=pooling, device="cpu").encode(captions)
        for row, caption in enumerate(captions):
            with torch.inference_mode():
                hidden = model(**tokenizer([caption], return_tensors="pt")).last_hidden_state[0]
            expected = hidden.mean(0) if pooling == "mean" else hidden[0]
            np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-5)


def test_captions_come_back_in_their_order_whatever_the_batch_size(text_encoder):
    captions = ["A " + " left red circle" * (seed % 4) + " star" * seed for seed in range(23)]
    whole, _ = text_encoder.encode(captions, batch_size=64)
    parts, _ = text_encoder.encode(captions, batch_size=3)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert len(np.unique(whole.round(4), axis=0)) == 23


def test_trap_truncation_is_counted_not_silent(text_encoder):
    captions = ["red " * 5000, "red " * 62, "red " * 63, "a red circle"]  # 64 positions, two of them special
    _, truncated = text_encoder.encode(captions)
    assert truncated.tolist() == [True, False, True, False]


def test_the_dataset_vocabulary_is_reproducible_and_kept_for_queries():
    captions = ["A red dog runs .", "A cat , 犬 and a dog"]
    spec = "hf:distilbert-base-uncased@random"
    encoder = TextEncoder(spec, captions=captions, device="cpu")
    assert encoder.recipe == TextEncoder(spec, captions=captions, device="cpu").recipe
    later = TextEncoder(spec, tokenizer_files=encoder.tokenizer_files, device="cpu")
    assert later.recipe == encoder.recipe
    query = ["a reddog 犬 unseen"]
    np.testing.assert_array_equal(later.encode(query)[0], encoder.encode(query)[0])
    words = later.tokenizer.wrapped.tokenize("A RED dog gods")
    assert words == ["a", "red", "dog", "g", "##o", "##d", "##s"]
    with pytest.raises(EncoderError, match="takes its vocabulary from a dataset"):
        TextEncoder(spec, device="cpu")


def test_trap_a_fingerprint_sees_all_that_changes_a_feature(tiny_bert, tmp_path, text_encoder):

    spec = f"hf:{tiny_bert}"
    recipes = [text_encoder.recipe]
    recipes += [
        TextEncoder(spec, device="cpu", **change).recipe
        for change in ({"pooling": "cls"}, {"max_length": 32}, {"dtype": "bfloat16"})
    ]
    moved = tmp_path / "bert"
    shutil.copytree(tiny_bert, moved)
    assert TextEncoder(f"hf:{moved}", device="cpu").recipe == text_encoder.recipe  # the folder's place does not count
    weights = safetensors.torch.load_file(moved / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5, 0] += 1e-3  # a fine-tuned model of the same name
    safetensors.torch.save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    recipes.append(TextEncoder(f"hf:{moved}", device="cpu").recipe)
    images = [
        ImageEncoder(SHUFFLENET, device="cpu", **change).recipe
        for change in ({}, {"views": 2}, {"seed": 1}, {"dtype": "bfloat16"})
    ]
    for found in (recipes, images):
        assert len({digest(recipe) for recipe in found}) == len(found)


def test_identity_sees_changed_files_without_loading(tiny_bert, tmp_path):

    folder = tmp_path / "bert"
    shutil.copytree(tiny_bert, folder)
    before = change_stamp(parse_spec(f"hf:{folder}"), 0)
    assert change_stamp(parse_spec(f"hf:{folder}"), 0) == before
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert change_stamp(parse_spec(f"hf:{folder}"), 0) != before


def test_local_torchvision_weights_are_read_without_pickle(tmp_path):
    import pickle

    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(5)
    model = shufflenet_v2_x0_5(weights=None)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    safetensors.torch.save_model(model, tmp_path / "w.safetensors")
    recipes = [
        ImageEncoder(f"torchvision:shufflenet_v2_x0_5@{tmp_path / name}", device="cpu").recipe
        for name in ("w.pth", "w.safetensors")
    ]
    assert recipes[0] == recipes[1] == ImageEncoder(SHUFFLENET, seed=5, device="cpu").recipe

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    spec = f"torchvision:shufflenet_v2_x0_5@{tmp_path / 'evil.pth'}"
    with pytest.raises(EncoderError) as error:
        ImageEncoder(spec, device="cpu")
    assert str(error.value) == (
        f"{spec}: {tmp_path / 'evil.pth'} is damaged, or holds Python objects other than tensors, which are not run; "
        "convert it to safetensors"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (ImageEncoder, "torchvision:nope", "has no classifier 'nope'"),
        (ImageEncoder, "torchvision:fcn_resnet50@random", "has no classifier"),
        (ImageEncoder, "torchvision:resnet18@WRONG", "neither a file nor one of resnet18's weights: IMAGENET1K_V1"),
        (TextEncoder, "torchvision:resnet50", "is no text encoder"),
    ],
)
def test_what_is_no_encoder_is_named(make, spec, message):
    with pytest.raises(EncoderError, match=message):
        make(spec, device="cpu")


def test_an_image_encoder_is_no_text_encoder_and_the_other_way_round(tiny_bert, tmp_path):
    with pytest.raises(EncoderError, match="holds no usable model"):
        ImageEncoder(f"hf:{tiny_bert}", device="cpu")
    with pytest.raises(EncoderError, match="holds no usable model"):
        TextEncoder(f"hf:{tmp_path}", device="cpu")


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_bert, tmp_path):

    folder = tmp_path / "bert"
    shutil.copytree(tiny_bert, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="lacks 1 weights of BertModel"):
        TextEncoder(f"hf:{folder}", device="cpu")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Every connection fails at once, and the caches are empty."""
    import socket

    def refuse(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("make", "spec", "parts"),
    [
        (ImageEncoder, "torchvision:resnet50", ("resnet50-0676ba61.pth", "torchvision:resnet50@FILE", "@random")),
        (
            TextEncoder,
            "hf:distilbert-base-uncased-not-cached",
            ("no such folder", "Hugging Face cache", "hf:FOLDER", "@random"),
        ),
        (ImageEncoder, "hf:org/not-cached", ("hf:org/not-cached", "hf:FOLDER", "@random")),
    ],
)
def test_weights_that_cannot_be_had_are_one_line_with_the_ways_out(no_network, make, spec, parts):
    with pytest.raises(EncoderError) as error:
        make(spec, device="cpu")
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_device_that_is_not_there():
    with pytest.raises(EncoderError, match="cannot be used"):
        pick_device("cuda:99")
    with pytest.raises(EncoderError, match="cannot be used"):
        pick_device("gpu")


def test_hugging_face_models_load_in_float32_although_stored_in_half(shared):
    encoder = TextEncoder(f"hf:{shared}/encoders/minilm_l6_384", device="cpu")
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    features, _ = encoder.encode(["A dog runs .", "A puppy is running .", "The stock market fell ."])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.6 > 0.2 > unit[0] @ unit[2]


def test_both_towers_of_a_dual_encoder(tiny_clip):
    images, texts = ImageEncoder(f"hf:{tiny_clip}", device="cpu"), TextEncoder(f"hf:{tiny_clip}", device="cpu")
    assert images.encode(images.pixels(noise())[None]).shape == (1, 1, 24)
    assert texts.encode(["a red circle"])[0].shape == (1, 24)
    assert images.recipe["pooling"] == texts.recipe["pooling"] == "projection"


def test_trap_a_siglip_caption_does_not_depend_on_its_batch(tmp_path, drawn):
    from transformers import SiglipConfig, SiglipModel

    from onceover.extract.layouts import read_dataset

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = dataset_tokenizer(read_dataset(drawn).captions)
    tokenizer.model_max_length = 24
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 32}
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    ).save_pretrained(tmp_path / "siglip")
    tokenizer.save_pretrained(tmp_path / "siglip")
    encoder = TextEncoder(f"hf:{tmp_path / 'siglip'}", device="cpu")
    captions = ["A red circle .", "On the left there is a blue star , and on the right a ring ."]
    together, _ = encoder.encode(captions)
    alone, _ = encoder.encode(captions[:1])
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_layers_lie_side_by_side_each_averaged_over_space():
    encoder = ImageEncoder(SHUFFLENET, layers="stage3, last", views=2, device="cpu")
    plain = ImageEncoder(SHUFFLENET, views=2, device="cpu")
    pixels = torch.stack([plain.pixels(noise(seed)) for seed in range(3)])
    found, alone = encoder.encode(pixels), plain.encode(pixels)
    assert found.shape == (3, 2, 96 + 1024)
    np.testing.assert_allclose(found[..., 96:], alone, atol=1e-5)
    seen = []
    plain.model.stage3.register_forward_hook(lambda _module, _inputs, output: seen.append(output.mean((2, 3))))
    with torch.inference_mode():
        plain.model(plain.preprocessing.scaled(pixels[:, 0].flip(-1)))
    np.testing.assert_allclose(found[:, 1, :96], seen[0], atol=1e-5)
    assert encoder.recipe["layers"] == ["stage3", "last"]
    assert digest(encoder.recipe) != digest(plain.recipe)


def test_layers_are_kept_apart_between_threads():
    from concurrent.futures import ThreadPoolExecutor

    encoder = ImageEncoder(SHUFFLENET, layers="last,stage2", device="cpu")
    batches = torch.randn(12, 1, 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = [encoder.encode(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(encoder.encode, batches), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_text_layers_are_hidden_states_and_the_mean_of_the_words(tiny_bert):
    from transformers import AutoModel, AutoTokenizer

    captions = ["A red circle .", "On the left there is a blue star .", ""]
    encoder = TextEncoder(f"hf:{tiny_bert}", layers="auto", device="cpu")
    assert encoder.recipe["layers"] == ["last", 1, "words"]
    found, _ = encoder.encode(captions)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    for row, caption in zip(found, captions, strict=True):
        inputs = tokenizer([caption], return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
            words = model.embeddings.word_embeddings(inputs["input_ids"][0, 1:-1])
        mean = words.mean(0) if len(words) else torch.zeros(32)
        expected = torch.cat([states[2][0].mean(0), states[1][0].mean(0), mean])
        np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "layers", "message"),
    [
        (ImageEncoder, "last,stage9", "has no module 'stage9'; near are stage"),
        (ImageEncoder, "more,stage2", "more stands alone in extract.image_layers"),
        (TextEncoder, "last,3", "'3' is no layer of the text encoder; use last, middle, words, or 0 to 2"),
        (TextEncoder, "first", "'first' is no layer of the text encoder"),
    ],
)
def test_a_layer_that_is_not_there_is_named(encoder, layers, message, tiny_bert):
    spec = SHUFFLENET if encoder is ImageEncoder else f"hf:{tiny_bert}"
    with pytest.raises(EncoderError, match=message):
        encoder(spec, layers=layers, device="cpu")


def test_a_dual_encoder_has_its_own_projection_alone(tiny_clip):
    for encoder in (ImageEncoder, TextEncoder):
        assert encoder(f"hf:{tiny_clip}", layers="auto", device="cpu").recipe["layers"] == ["last"]
    assert ImageEncoder(f"hf:{tiny_clip}", layers="more", device="cpu").recipe["layers"] == ["last"]
    for encoder in (ImageEncoder, TextEncoder):
        with pytest.raises(EncoderError, match="leave extract.(image|text)_layers at last"):
            encoder(f"hf:{tiny_clip}", layers="last,0", device="cpu")


def test_auto_takes_the_layers_that_were_measured(shared):
    encoder = ImageEncoder(f"hf:{shared}/encoders/mobilenet_v2_1.0_224", layers="auto", device="cpu")
    assert encoder.recipe["layers"] == ["last", "layer.15.conv_3x3", "layer.12.expand_1x1"]
    assert encoder.encode(torch.zeros(1, 1, 3, 224, 224)).shape == (1, 1, 1280 + 960 + 576)
    more = ImageEncoder(f"hf:{shared}/encoders/mobilenet_v2_1.0_224", layers=" more ", device="cpu")
    assert more.recipe["layers"][:3] == encoder.recipe["layers"]
    assert more.encode(torch.zeros(1, 1, 3, 224, 224)).shape == (1, 1, 6272)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_more_takes_layers_that_every_resnet_has(name):
    encoder = ImageEncoder(f"torchvision:{name}@random", layers="more", device="cpu")
    assert encoder.recipe["layers"] == ["last", "layer4.0", "layer3", "layer2"]


def test_more_is_the_last_layer_where_no_others_are_known():
    assert ImageEncoder(SHUFFLENET, layers="more", device="cpu").recipe["layers"] == ["last"]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_trap_code_in_a_tokenizer_is_never_run_and_never_asked_for(tiny_bert, tmp_path, monkeypatch):
    files = files_of(tiny_bert)
    settings = json.loads(files["tokenizer_config.json"])
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil:\n    pass\n".encode()
    files |= {"tokenizer_config.json": json.dumps(settings).encode(), "evil.py": evil}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(EncoderError) as error:
        TextEncoder(f"hf:{tiny_bert}", tokenizer_files=files, device="cpu")
    assert str(error.value) == (
        "the tokenizer's tokenizer_config.json names Python code of its own (auto_map), which is never run; "
        "use a store or run whose tokenizer needs none"
    )
    for name, data in files.items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    shutil.copy(tiny_bert / "model.safetensors", tmp_path / "folder")
    encoder = TextEncoder(f"hf:{tmp_path / 'folder'}", device="cpu")  # its class is the library's own
    assert "auto_map" not in json.loads(encoder.tokenizer_files["tokenizer_config.json"])
    assert "evil.py" not in encoder.tokenizer_files
    assert not (tmp_path / "ran").exists()


def test_trap_no_file_but_a_tokenizers_own_leaves_a_store(tiny_bert, text_encoder):
    files = {
        "vocab.txt": b"a",
        "evil.py": b"",
        "../x": b"",
        "config.json": b"",
        "tokenizer.json": b"{}",
        "vocab.pkl": b"",
    }
    assert known_tokenizer_files(files) == {"vocab.txt": b"a", "tokenizer.json": b"{}"}
    encoder = TextEncoder(f"hf:{tiny_bert}", tokenizer_files=text_encoder.tokenizer_files | {"x.py": b""}, device="cpu")
    assert encoder.tokenizer_files == text_encoder.tokenizer_files
    assert encoder.recipe == text_encoder.recipe
    cleaned = without_code({"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": "x.Y"}, "a": 1}'})
    assert json.loads(cleaned["tokenizer_config.json"]) == {"a": 1}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"[" * 100_000},
        {"tokenizer.json": b'{"model": {"type": "WordPiece", "vocab": {"a": -1}}}'},
        {"tokenizer.json": b"\xff\xfe", "tokenizer_config.json": b"{}"},
        {"tokenizer_config.json": b"[]"},
        {"tokenizer_config.json": b"[" * 100_000},
        {"tokenizer_config.json": b'{"tokenizer_class": "NoSuchTokenizer"}'},
        {"tokenizer.model": b"\0" * 50, "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer"}'},
    ],
    ids=lambda files: " ".join([*files, *(f"{data[:12]!r}" for data in files.values())]) or "none",
)
def test_trap_a_damaged_tokenizer_is_one_line(tiny_bert, files, capfd):
    with pytest.raises(EncoderError, match="holds no usable model") as error:
        TextEncoder(f"hf:{tiny_bert}", tokenizer_files=files, device="cpu")
    assert str(error.value).isprintable()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"[" * 100_000),
        ("config.json", b"\xff"),
        ("config.json", b'{"model_type": "bert", "hidden_size": -3}'),
        ("config.json", b'{"model_type": "bert", "hidden_size": "x"}'),
        ("config.json", b'{"model_type": "nothing"}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("tokenizer.json", b"{}"),
    ],
    ids=lambda value: f"{value[:30]!r}",
)
def test_trap_a_damaged_model_folder_is_one_line(tiny_bert, tmp_path, file, data):
    folder = shutil.copytree(tiny_bert, tmp_path / "bert")
    (folder / file).write_bytes(data)
    with pytest.raises(EncoderError) as error:
        TextEncoder(f"hf:{folder}", device="cpu")
    assert str(error.value).startswith(f"hf:{folder}: ")
    assert str(error.value).isprintable()


def test_trap_a_fifo_in_a_models_folder_is_not_waited_for(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(FileError) as error:
        TextEncoder(f"hf:{folder}", device="cpu")
    assert str(error.value) == f"{folder / 'model.safetensors'} is a FIFO; a regular file is needed"


def test_trap_a_full_disk_while_a_tokenizer_is_saved_stays_the_systems_error(tiny_bert, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def save(*_args, **_options):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)
    with pytest.raises(OSError, match="No space left on device") as error:
        TextEncoder(f"hf:{tiny_bert}", device="cpu")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, tempfile.gettempdir())


def test_trap_a_full_disk_while_weights_are_saved_stays_the_systems_error(monkeypatch, tmp_path):
    def save(*_args, **_options):
        raise safetensors.SafetensorError("Error while serializing: No space left on device (os error 28)")

    encoder = ImageEncoder(SHUFFLENET, device="cpu", plain=True)
    monkeypatch.setattr(safetensors.torch, "save_model", save)
    with pytest.raises(OSError, match="No space left on device") as error:
        encoder.save(tmp_path)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))


@pytest.mark.parametrize(
    "device", ["meta", "cuda:99", "gpu", "", "cpu\nx", "x" * 1000, "xla", "hpu"], ids=lambda name: f"{name:.9}"
)
def test_trap_a_device_that_computes_nothing_is_one_line(device):
    with pytest.raises(EncoderError, match=r"^the device '.* cannot be used \(.*\); try --device cpu$") as error:
        pick_device(device)
    assert str(error.value).isprintable()


def test_trap_half_a_character_is_no_text(text_encoder):
    with pytest.raises(EncoderError) as error:
        text_encoder.encode(["a red circle", "\udcff"])
    assert str(error.value) == "text 2 of 2 holds half a character; write it as UTF-8"


@pytest.fixture(scope="module")
def shufflenet():
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(5)
    return shufflenet_v2_x0_5(weights=None).state_dict()


def without_classifier(weights):
    return {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}, "epoch": 3},
        lambda weights: {"model": weights},
        without_classifier,
        lambda weights: without_classifier(weights) | {"fc.weight": torch.ones(7, 1024), "fc.bias": torch.ones(7)},
        lambda weights: without_classifier(weights) | {"fc.0.weight": torch.ones(7, 1024)},
        lambda weights: {name: tensor for name, tensor in weights.items() if "num_batches" not in name},
    ],
    ids=["wrapped", "within state_dict", "within model", "no classifier", "seven classes", "another classifier", "old"],
)
def test_weights_that_people_trained_are_those_of_the_backbone(shufflenet, tmp_path, change):
    torch.save(change(shufflenet), tmp_path / "w.pth")
    encoder = ImageEncoder(f"torchvision:shufflenet_v2_x0_5@{tmp_path / 'w.pth'}", device="cpu")
    assert encoder.recipe == ImageEncoder(SHUFFLENET, seed=5, device="cpu").recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {name: tensor for name, tensor in weights.items() if name != "conv5.0.weight"},
            " lacks 1 weights of shufflenet_v2_x0_5 (the first: conv5.0.weight); name the model that it is of",
        ),
        (
            lambda weights: weights | {"conv5.0.weight": torch.ones(2)},
            ": conv5.0.weight has the shape (2,), and that of shufflenet_v2_x0_5 is (1024, 192, 1, 1); name the model",
        ),
        (
            lambda weights: weights | {"stage9.weight": torch.ones(2)},
            " holds 1 weights that shufflenet_v2_x0_5 has not (the first: stage9.weight); name the model that it is of",
        ),
        (lambda weights: {}, " holds no weights by their names; save a model's state_dict()"),
        (lambda weights: [1, 2], " holds no weights by their names; save a model's state_dict()"),
    ],
    ids=["missing", "misshapen", "of a larger model", "empty", "a list"],
)
def test_trap_weights_of_another_backbone_are_refused(shufflenet, tmp_path, change, message):
    file = tmp_path / "w.pth"
    torch.save(change(shufflenet), file)
    spec = f"torchvision:shufflenet_v2_x0_5@{file}"
    with pytest.raises(EncoderError) as error:
        ImageEncoder(spec, device="cpu")
    assert str(error.value).startswith(f"{spec}: {file}{message}")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_trap_damaged_weights_are_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02no weights at all\n" * 9)
    with pytest.raises(EncoderError) as error:
        ImageEncoder(f"torchvision:shufflenet_v2_x0_5@{tmp_path / name}", device="cpu")
    assert str(error.value).isprintable()
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    "text", [f"hf:{'x' * 300}", f"hf:a/{'é' * 200}", "hf:a\0b", f"torchvision:resnet18@{'x' * 5000}"]
)
def test_trap_what_no_file_system_could_name_is_no_specification(text):
    with pytest.raises(EncoderError, match="is no encoder specification; write torchvision:NAME") as error:
        parse_spec(text)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 320
