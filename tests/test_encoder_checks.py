"""Encoders are checked before a store is made: refusals, findings, and the unknown tokens of captions."""

import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from test_encoder_libraries import TOY
from torchvision.transforms.functional import pil_to_tensor

from onceover.analysis.describe import describe
from onceover.base.hdf5 import sign_hdf5
from onceover.extract import encoder_checks
from onceover.extract.begin import readable_images
from onceover.extract.encoder_checks import check_captions, check_images
from onceover.extract.encoders import EncoderError
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder
from onceover.extract.image_source import FolderImages
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import NOT_COUNTED, FeatureStore, parts_folder
from onceover.extract.unknown import count_unknown

SHUFFLENET = "torchvision:shufflenet_v2_x0_5@random"
FOREIGN = ["一只狗在草地上奔跑", "कुत्ता घास में दौड़ता है", "🐕🌳"]
POOL = "lambda module, batch: module(batch)"
STATES = '{"last": module(inputs["input_ids"]), 0: module(inputs["input_ids"])}'


@pytest.fixture
def data(drawn, tmp_path):
    """A copy of the drawn dataset, of which the first 10 images have their 50 captions, to add captions to."""
    folder = shutil.copytree(drawn, tmp_path / "data")
    lines = (folder / "captions.csv").read_text().splitlines(keepends=True)
    (folder / "captions.csv").write_text("".join(lines[:51]))
    return folder


def add_captions(data, captions):
    with (data / "captions.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"images/0000.jpg,{caption},train\n" for caption in captions)


@pytest.fixture
def toy_images(outside, drawn):
    """Checks an image encoder whose own feature is computed by the given function of module and batch."""

    def check(pool):
        outside("onceover.encoders", "toy", TOY.replace(POOL, pool))
        return check_images(ImageEncoder("toy:one", device="cpu"), "toy:one", FolderImages(drawn), ["images/0000.jpg"])

    return check


@pytest.fixture
def toy_captions(outside):
    """Checks a text encoder whose hidden states are the given expression of module and inputs."""

    def check(states, captions=("a red circle", "A green square on the left")):
        outside("onceover.encoders", "toy", TOY.replace(STATES, states))
        return check_captions(TextEncoder("toy:two", device="cpu"), "toy:two", captions, {})

    return check


def test_trap_a_model_that_masks_at_random_is_refused_and_nothing_is_begun(drawn, tmp_path, run):
    from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "mae"
    ViTMAEModel(ViTMAEConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    store = tmp_path / "s.h5"
    options = ("--text-encoder", "hf:distilbert-base-uncased@random", "--device", "cpu")
    refused = run("extract", "--data", drawn, "--store", store, "--image-encoder", f"hf:{folder}", *options, code=1)
    last = refused.stderr.splitlines()[-1]
    assert last.startswith(f"error: hf:{folder}: two passes over the same images differ by ")
    assert last.endswith("as ViTMAE's kind does in pre-training; name another encoder")
    assert not store.exists()
    assert not parts_folder(store).exists()


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (
            "lambda module, batch: module(batch) - module(batch).mean(0)",
            "toy:one: image features depend on what else is",
        ),
        (
            "lambda module, batch: module(batch) + module(batch).amax(0)",
            "BatchNorm that takes a batch's own statistics",
        ),
        ("lambda module, batch: module(batch).cumsum(0)", "alone they differ by .* of their spread, where rounding in"),
        (
            "lambda module, batch: module(batch) + 1e-6 * __import__('torch').randn(1)",
            "two passes over the same images",
        ),
        (
            "lambda module, batch: module(batch).view(-1, 4, 6)",
            "gives 1 x 4 x 6 numbers for 1 image, and not one vector",
        ),
        ("lambda module, batch: module(batch)[:1]", "gives 1 x 24 numbers for 3 images, and not one vector each"),
        ("lambda module, batch: module(batch)[:, : len(batch) + 1]", "gives vectors of 2 and of 4 numbers"),
        ("lambda module, batch: module(batch) / 0 * 0", "toy:one gives no number that is finite, in float32"),
    ],
    ids=["mean", "largest", "sum of earlier ones", "noise", "tokens", "one", "length", "not finite"],
)
def test_image_models_whose_features_are_of_no_use_are_refused(toy_images, pool, message):
    with pytest.raises(EncoderError, match=message):
        toy_images(pool)


def test_trap_batch_norm_in_train_mode_is_refused(outside, drawn):
    module = "nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(2), nn.Flatten())"
    library = TOY.replace("nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24))", module)
    outside("onceover.encoders", "toy", library.replace(POOL, "lambda module, batch: module.train()(batch)"))
    encoder = ImageEncoder("toy:one", device="cpu")
    with pytest.raises(EncoderError, match="image features depend on what else is in the batch"):
        check_images(encoder, "toy:one", FolderImages(drawn), ["images/0000.jpg"])


def test_a_preprocessing_that_keeps_the_aspect_is_refused(drawn, monkeypatch):
    encoder = ImageEncoder(SHUFFLENET, device="cpu")
    monkeypatch.setattr(encoder.preprocessing, "preprocess", pil_to_tensor)
    message = r"images of different shapes \(3 x 256 x 512 and 3 x 512 x 256\), which cannot"
    with pytest.raises(EncoderError, match=message):
        check_images(encoder, SHUFFLENET, FolderImages(drawn), [])


def test_the_number_of_forward_passes_is_counted_and_below_ten(drawn, tiny_bert):
    images = ImageEncoder(SHUFFLENET, views=4, device="cpu")
    texts = TextEncoder(f"hf:{tiny_bert}", device="cpu")
    passes = {"image": 0, "text": 0}
    for kind, encoder in (("image", images), ("text", texts)):

        def count(*_, kind=kind):
            passes[kind] += 1

        encoder.model.register_forward_hook(count)
    dataset = read_dataset(drawn)
    found = {
        "image": check_images(images, SHUFFLENET, dataset.images, dataset.paths),
        "text": check_captions(texts, "hf:bert", dataset.captions, {}),
    }
    assert passes == {kind: findings["passes"] for kind, findings in found.items()} == {"image": 4, "text": 4}
    for findings in found.values():
        assert findings["difference"] < 1e-4
        assert findings["records"] == 3
        assert findings["dtype"] == "float32"
    lengths = map(len, texts.tokenize(dataset.captions)[0])
    assert found["text"]["longest"] == max(lengths)


def test_half_precision_is_allowed_its_rounding(drawn, tiny_bert):
    dataset = read_dataset(drawn)
    image = ImageEncoder(SHUFFLENET, dtype="bfloat16", device="cpu")
    found = check_images(image, SHUFFLENET, dataset.images, dataset.paths)
    text = TextEncoder(f"hf:{tiny_bert}", dtype="bfloat16", device="cpu")
    for findings in (found, check_captions(text, "hf:bert", dataset.captions, {})):
        assert (findings["dtype"], findings["passes"]) == ("bfloat16", 4)
        assert findings["difference"] <= encoder_checks.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("keys", [[], ["images/0000.jpg"], ["captions.csv", "no-such.jpg"]])
def test_an_encoder_is_checked_whatever_images_there_are(drawn, keys):
    findings = check_images(ImageEncoder(SHUFFLENET, device="cpu"), SHUFFLENET, FolderImages(drawn), keys)
    assert findings["records"] == 2 + (keys == ["images/0000.jpg"])


def test_an_encoder_is_checked_with_one_caption(tiny_bert):
    encoder = TextEncoder(f"hf:{tiny_bert}", device="cpu")
    for caption in ("A red circle .", encoder_checks.SHORT, "🐕"):
        assert check_captions(encoder, "hf:bert", [caption], {})["records"] == 3


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (STATES.replace("module(", "module[0]("), "toy:two cannot encode 1 of the captions"),
        (
            '{"last": module(inputs["input_ids"]) * inputs["input_ids"].shape[1]}',
            r"caption features depend on what else .* \(padding that is not masked\?\); name another encoder",
        ),
        (
            '{"last": module(inputs["input_ids"]).unsqueeze(1).expand(-1, 3, -1, -1)}',
            "toy:two gives 1 x 2 x 16 numbers for 1 caption, and not one vector each",
        ),
    ],
    ids=["fails", "padding", "shape"],
)
def test_text_models_whose_features_are_of_no_use_are_refused(toy_captions, states, message):
    with pytest.raises(EncoderError, match=message):
        toy_captions(states)


def test_trap_an_encoder_that_fails_at_long_captions_is_refused_before_images_are_encoded(
    outside, data, tmp_path, extract_config, monkeypatch
):
    states = '{"last": module(inputs["input_ids"]) + module.weight[:30][inputs["input_ids"].shape[1]]}'
    outside("onceover.encoders", "toy", TOY.replace(STATES, states))
    add_captions(data, ["red " * 40])
    begun = []
    monkeypatch.setattr(ImageEncoder, "begin", lambda *_: begun.append(1))
    config = extract_config.__class__(**{**extract_config.__dict__, "text_encoder": "toy:two"})
    with pytest.raises(EncoderError) as error:
        extract(read_dataset(data), tmp_path / "s.h5", config, device="cpu")
    assert str(error.value) == (
        "toy:two cannot encode the longest caption, of 40 tokens "
        "(index 40 is out of bounds for dimension 0 with size 30); set extract.max_length to fewer"
    )
    assert begun == []
    assert not parts_folder(tmp_path / "s.h5").exists()


def test_trap_a_folder_without_its_tokenizer_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=3000, **sizes)).save_pretrained(folder)
    with pytest.raises(EncoderError) as error:
        check_captions(TextEncoder(f"hf:{folder}", device="cpu"), f"hf:{folder}", ["a dog"], {})
    assert str(error.value).startswith(f"hf:{folder}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "known", "is_refused"), [(5, 30522, True), (50257, 50304, False), (259, 384, False)])
def test_a_vocabulary_far_smaller_than_the_models_is_refused(size, known, is_refused):
    class Tokenizer:
        pass

    class Encoder:
        tokenizer = Tokenizer()
        vocabulary = known

    encoder_checks.check_vocabulary(Encoder(), "hf:x")  # a tokenizer that does not say
    Tokenizer.size = size
    if not is_refused:
        encoder_checks.check_vocabulary(Encoder(), "hf:x")
        return
    with pytest.raises(EncoderError) as error:
        encoder_checks.check_vocabulary(Encoder(), "hf:x")
    assert str(error.value) == (
        "hf:x: its tokenizer has 5 entries, and its model knows 30,522: almost every word would be unknown; "
        "save the model's own tokenizer beside it (tokenizer.save_pretrained)"
    )


def test_hugging_face_models_say_how_many_ids_they_know(tiny_bert, tiny_clip):
    for folder in (tiny_bert, tiny_clip):
        encoder = TextEncoder(f"hf:{folder}", device="cpu")
        assert encoder.vocabulary == encoder.tokenizer.size == len(encoder.tokenizer.wrapped.get_vocab())


def test_an_id_that_also_ends_a_text_is_not_the_unknown_one(tiny_bert):
    encoder = TextEncoder(f"hf:{tiny_bert}", device="cpu")
    tokenizer = encoder.tokenizer
    assert tokenizer.unknown_id == tokenizer.wrapped.convert_tokens_to_ids("[UNK]")
    tokenizer.wrapped.eos_token = tokenizer.wrapped.unk_token
    assert tokenizer.unknown_id is None
    assert encoder.unknown_tokens(encoder.tokenize(FOREIGN)[0])[0].tolist() == [0, 0, 0]
    encoder.tokenizer = type("Bare", (), {"frame_ids": []})()  # of a library that does not say
    assert [counts.tolist() for counts in encoder.unknown_tokens([[1, 2, 3], []])] == [[0, 0], [3, 0]]


def test_unknown_tokens_are_counted_exactly(data, tmp_path, extract_config, tiny_bert):
    add_captions(data, [*FOREIGN, "a red 狗 ring", "red " * 5000])
    summary = extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    wrapped = TextEncoder(f"hf:{tiny_bert}", device="cpu").tokenizer.wrapped
    with FeatureStore(tmp_path / "s.h5") as store:
        assert store.unknown.dtype == store.tokens.dtype == np.int32
        for caption, unknown, tokens in zip(store.captions, store.unknown, store.tokens, strict=True):
            words = wrapped.tokenize(caption)[:62]  # of 64 positions, two of them special
            assert (unknown, tokens) == (words.count("[UNK]"), len(words)), caption
        assert store.unknown[-2] == 1
        assert store.verify() == []
        expected = int((store.unknown > 0).sum())
        assert (summary.unknown.with_unknown, summary.unknown.captions) == (expected, 55)
        assert summary.unknown.unknown == store.unknown.sum()


def test_a_small_share_of_unknown_tokens_is_a_note_and_a_large_one_a_warning():
    captions = ["a dog"] * 199 + ["狗"]
    few = count_unknown(captions, np.array([0] * 199 + [1]), np.array([2] * 199 + [1]))
    assert str(few) == "captions with unknown tokens: 1 of 200 (under 1 %); unknown tokens: under 1 %"
    assert few.warning() is None
    many = count_unknown(["狗", "a dog", "猫"], np.array([1, 0, 2]), np.array([1, 3, 2]))
    assert str(many) == "captions with unknown tokens: 2 of 3 (67 %); unknown tokens: 50 %"
    assert many.warning() == (
        "the text encoder's vocabulary lacks much of the captions (50 % of their tokens), as of '狗'; take one for "
        "their language, or a multilingual one such as hf:distilbert-base-multilingual-cased"
    )
    some = count_unknown(["狗"] * 2 + ["a dog"] * 98, np.array([1] * 2 + [0] * 98), np.array([1] * 2 + [9] * 98))
    assert some.warning()  # 2 % of the captions, whose tokens are few
    earlier = count_unknown(["a", "b"], np.array([NOT_COUNTED, 0]), np.array([NOT_COUNTED, 3]))
    assert str(earlier) == (
        "captions with unknown tokens: 0 of 1 (0 %); unknown tokens: 0 %; 1 caption was encoded by an earlier version, "
        "which did not count"
    )
    assert (earlier.tokens, earlier.example, earlier.warning()) == (3, "", None)


def test_trap_captions_in_a_language_that_the_vocabulary_lacks_are_warned_of(data, tmp_path, extract_config, run):
    add_captions(data, FOREIGN * 20)
    store = tmp_path / "s.h5"
    options = ("--set", "extract.text_layers=last", "--set", "extract.views=1", "--device", "cpu")
    encoders = ("--image-encoder", extract_config.image_encoder, "--text-encoder", extract_config.text_encoder)
    told = run("extract", "--data", data, "--store", store, *encoders, *options).stderr
    assert "the text encoder's vocabulary lacks much of the captions (" in told
    assert "a multilingual one such as hf:distilbert-base-multilingual-cased" in told
    assert "captions with unknown tokens: 60 of 110 (55 %); unknown tokens: " in told
    shown = run("info", store).stdout
    assert "captions with unknown tokens: 60 of 110 (55 %); unknown tokens: " in shown
    assert "  warning     the text encoder's vocabulary lacks much of the captions (" in shown


def test_a_query_with_unknown_tokens_is_warned_of(run, run_dir):
    told = run("search", "--run", run_dir, "--query", "一只狗", "--device", "cpu").stderr
    assert "3 of 3 tokens are unknown to the text encoder, and count for nothing: '一只狗'" in told
    assert "unknown" not in run("search", "--run", run_dir, "--query", "a red circle", "--device", "cpu").stderr


def test_the_findings_stand_in_info(store_file):
    lines = describe(store_file).splitlines()
    found = [line.strip() for line in lines if "checked" in line]
    assert len(found) == 2
    for line, inputs in zip(found, ("images of two other shapes", "the longest caption, "), strict=True):
        batched = r"(as do alone and in a batch|alone and in a batch to [1-9]e-\d\d of the spread)"
        assert re.match(rf"checked: two passes agree to the bit, {batched} \(float32\), {inputs}", line)
        assert "; 4 passes in " in line
    assert any("captions with unknown tokens: 0 of 300 (0 %); unknown tokens: 0 %" in line for line in lines)


def test_an_encoder_is_checked_once_for_a_store_and_never_at_a_query(
    data, tmp_path, extract_config, run, run_dir, monkeypatch
):
    path = tmp_path / "s.h5"
    extract(read_dataset(data), path, extract_config, device="cpu")
    with FeatureStore(path) as store:
        before = {kind: store.provenance[kind]["check"] for kind in ("image", "text")}
    checked = []
    agreement = encoder_checks._agreement
    monkeypatch.setattr(encoder_checks, "_agreement", lambda *given: checked.append(given[1]) or agreement(*given))
    run("search", "--run", run_dir, "--query", "a red circle", "--device", "cpu")
    extract(read_dataset(data), path, extract_config, device="cpu")
    add_captions(data, ["A short one ."])
    extract(read_dataset(data), path, extract_config, device="cpu")
    assert checked == []
    with FeatureStore(path) as store:
        assert {kind: store.provenance[kind]["check"] for kind in ("image", "text")} == before
    add_captions(data, ["red " * 50])
    extract(read_dataset(data), path, extract_config, device="cpu")
    assert checked == ["caption"]
    with FeatureStore(path) as store:
        assert store.provenance["image"]["check"] == before["image"]
        assert store.provenance["text"]["check"]["longest"] == 52


def test_a_store_of_an_earlier_version_is_read_and_extended(drawn, store_file, tmp_path, extract_config):
    data = shutil.copytree(drawn, tmp_path / "data")
    path = shutil.copy(store_file, tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        for name in ("unknown", "tokens"):
            del file[f"text/{name}"]
        provenance = encoder_checks_removed(file.attrs["provenance"])
        file.attrs["provenance"] = provenance
    sign_hdf5(path)
    with FeatureStore(path) as store:
        assert store.unknown is store.tokens is None
        assert store.verify() == []
    shown = describe(path)
    assert "unknown tokens were not counted" in shown
    assert shown.count("not checked, as stores of earlier versions and imported ones are not") == 2
    add_captions(data, ["a 狗"])
    summary = extract(read_dataset(data), path, extract_config, device="cpu")
    assert summary.computed == {"image": 0, "text": 1}
    with FeatureStore(path) as store:
        assert store.unknown.tolist() == [NOT_COUNTED] * 300 + [1]
        assert store.tokens.tolist() == [NOT_COUNTED] * 300 + [2]
        assert store.verify() == []
        assert "check" in store.provenance["image"]
    assert (
        "captions with unknown tokens: 1 of 1 (100 %); unknown tokens: 50 %; 300 captions were encoded by an"
        in describe(path)
    )


def encoder_checks_removed(provenance):
    """A store's provenance as an earlier version wrote it."""
    import json

    record = json.loads(provenance)
    for kind in ("image", "text"):
        del record[kind]["check"]
    return json.dumps(record)


def test_a_resumed_extraction_has_findings_too(data, tmp_path, extract_config, monkeypatch, interrupt_after):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    extract(read_dataset(data), tmp_path / "s.h5", extract_config, device="cpu")
    with FeatureStore(tmp_path / "s.h5") as store:
        assert {store.provenance[kind]["check"]["passes"] for kind in ("image", "text")} == {4}
        assert (store.unknown == 0).all()


def test_features_before_rounding_are_those_that_are_stored(drawn, tiny_bert):
    image = ImageEncoder(SHUFFLENET, views=2, store_dtype="float16", device="cpu")
    pixels = torch.stack(list(readable_images(FolderImages(drawn), ["images/0000.jpg", "images/0001.jpg"], image.read)))
    computed = image.computed(pixels)
    assert computed.dtype == np.float32
    np.testing.assert_array_equal(computed.astype(np.float16), image.encode(pixels)[:, 0])
    text = TextEncoder(f"hf:{tiny_bert}", store_dtype="float16", device="cpu")
    ids = text.tokenize(["a red circle", "A star ."])[0]
    np.testing.assert_array_equal(text.computed(ids).astype(np.float16), text.encode_tokens(ids))
