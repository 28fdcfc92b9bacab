"""Specifications of encoders as people write them, and encoders that are no longer where they were."""

import json
import shutil
import sys

import pytest

from onceover.extract.encoders import (
    EncoderError,
    huggingface,
    open_clip,
    parse_spec,
    sentence_transformers,
    timm,
    torchvision,
)
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder

FORMS = "torchvision:NAME[@WEIGHTS], "


def answer(text):
    """The specifications that the error about ``text`` names."""
    with pytest.raises(EncoderError) as error:
        parse_spec(text)
    start = f"{text!r} is no encoder specification; write "
    assert str(error.value).startswith(start)
    named, forms, rest = str(error.value).removeprefix(start).partition(" (the forms: ")
    assert not forms or FORMS in rest
    return named.split(" or ")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("resnet50", "torchvision:resnet50"),
        ("resnet50@random", "torchvision:resnet50@random"),
        ("distilbert-base-uncased", "hf:distilbert-base-uncased"),
        ("distilbert-base-uncased@random", "hf:distilbert-base-uncased@random"),
        ("gpt2", "hf:gpt2"),
        ("openai/clip-vit-base-patch32", "hf:openai/clip-vit-base-patch32"),
        ("google/siglip-base-patch16-224#v1", "hf:google/siglip-base-patch16-224#v1"),
        ("https://huggingface.co/openai/clip-vit-base-patch32", "hf:openai/clip-vit-base-patch32"),
    ],
)
def test_a_name_without_a_prefix_is_answered_with_the_specification_that_is_meant(text, meant):
    assert meant in answer(text)
    parse_spec(meant)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ResNet50", "torchvision:resnet50"),
        ("resnet-50", "torchvision:resnet50"),
        ("vit-b-16", "torchvision:vit_b_16"),
        ("DistilBERT-base-uncased", "hf:distilbert-base-uncased"),
        ("HF:gpt2", "hf:gpt2"),
        ("huggingface:gpt2", "hf:gpt2"),
        ("torchvison:resnet50", "torchvision:resnet50"),
        ("TorchVision:resnet50", "torchvision:resnet50"),
    ],
)
def test_a_name_or_a_prefix_that_is_nearly_right_is_answered_with_the_right_one(text, meant):
    assert meant in answer(text)


def test_a_name_that_a_library_has_as_it_stands_is_not_mistaken_for_one_that_is_like_it():
    assert torchvision.knows("resnet18") == "torchvision:resnet18"
    assert answer("vit_b_16") == [spec for spec in answer("vit_b_16") if spec.endswith(":vit_b_16")]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("all-MiniLM-L6-v2", ["st:all-MiniLM-L6-v2"]),
        ("sentence-transformers/all-MiniLM-L6-v2", ["st:sentence-transformers/all-MiniLM-L6-v2"]),
        ("https://huggingface.co/sentence-transformers/LaBSE#main", ["st:sentence-transformers/LaBSE#main"]),
        ("BAAI/bge-small-en-v1.5", ["hf:BAAI/bge-small-en-v1.5"]),
    ],
)
def test_a_model_of_the_owner_sentence_transformers_is_answered_with_st_alone(text, meant):
    assert answer(text) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ViT-B-32", ["open_clip:ViT-B-32"]),
        ("ViT-B-32@laion2b_s34b_b79k", ["open_clip:ViT-B-32@laion2b_s34b_b79k"]),
        ("vit_base_patch16_224.augreg_in21k", ["timm:vit_base_patch16_224.augreg_in21k"]),
        ("ViT_Tiny_Patch16_224@random", ["timm:vit_tiny_patch16_224@random"]),
        ("resnet50", ["torchvision:resnet50", "timm:resnet50"]),
    ],
)
def test_names_of_timm_and_open_clip_are_answered_with_those_and_the_default_library_comes_first(text, meant):
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    assert answer(text) == meant


@pytest.mark.parametrize("text", ["ViT-B-32", "vit_base_patch16_224.augreg_in21k", "nothing"])
def test_optional_libraries_that_are_missing_know_no_names(text, monkeypatch):
    for module in ("timm", "open_clip", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    assert timm.knows(text) is None
    assert open_clip.knows(text) is None
    assert sentence_transformers.knows(text) is None
    assert sentence_transformers.knows("all-MiniLM-L6-v2") == "st:all-MiniLM-L6-v2"


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("hf", {"config.json": {"model_type": "bert"}}),
        ("timm", {"config.json": {"architecture": "resnet50"}}),
        ("st", {"config.json": {"model_type": "bert"}, "modules.json": []}),
        ("open_clip", {"config.json": {"model_type": "clip"}, "open_clip_config.json": {}}),
    ],
)
def test_a_folder_is_that_of_the_library_whose_files_it_has(library, files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert parse_spec(str(tmp_path)) == parse_spec(f"{library}:{tmp_path}")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_folder_whose_settings_cannot_be_read_is_of_no_library(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(EncoderError, match="is no encoder specification"):
        parse_spec(str(tmp_path))


@pytest.mark.parametrize("text", ["", "nothing like it", "x:y", ":", "a\0b", "x" * 300])
def test_what_nobody_knows_is_answered_with_the_forms(text):
    with pytest.raises(EncoderError) as error:
        parse_spec(text)
    assert f" is no encoder specification; write {FORMS}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ResNet50", "; did you mean torchvision:resnet50?"),
        ("resnet_50", "; did you mean torchvision:resnet50?"),
        ("efficientnet_b9", "; did you mean torchvision:efficientnet_b"),
        ("nothing", " (resnet50 and vit_b_16 are two)"),
    ],
)
def test_a_classifier_that_torchvision_has_under_another_name_is_suggested(name, hint):
    with pytest.raises(EncoderError) as error:
        ImageEncoder(f"torchvision:{name}", device="cpu")
    assert str(error.value).startswith(f"torchvision:{name}: torchvision has no classifier {name!r}{hint}")


def test_a_folder_of_a_model_needs_no_prefix(tiny_bert, monkeypatch):
    spec = parse_spec(str(tiny_bert))
    assert spec == parse_spec(f"hf:{tiny_bert}")
    assert TextEncoder(str(tiny_bert), device="cpu").recipe == TextEncoder(f"hf:{tiny_bert}", device="cpu").recipe
    monkeypatch.chdir(tiny_bert.parent)
    assert parse_spec(tiny_bert.name).located() == f"hf:{tiny_bert}"


def test_a_folder_that_several_libraries_can_read_is_answered_with_all(tiny_bert, monkeypatch):
    monkeypatch.setattr(torchvision, "knows", lambda text: f"torchvision:{text}")
    assert answer(str(tiny_bert)) == [f"torchvision:{tiny_bert}", f"hf:{tiny_bert}"]


@pytest.mark.parametrize("name", ["BERT", "berts"])
def test_a_folder_that_is_nearly_there_is_suggested(tiny_bert, name, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError("network is unreachable")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(EncoderError) as error:
        TextEncoder(f"hf:{tiny_bert.with_name(name)}", device="cpu")
    assert f"; did you mean hf:{tiny_bert}? Or name a local copy (hf:FOLDER)" in str(error.value)


def test_a_folder_without_a_model_is_none(tmp_path):
    assert huggingface.knows(str(tmp_path)) is None
    assert torchvision.knows(str(tmp_path)) is None
    with pytest.raises(EncoderError, match="is no encoder specification"):
        parse_spec(str(tmp_path))


def test_specs_know_what_is_missing(tmp_path):
    here = tmp_path / "model"
    here.mkdir()
    assert parse_spec(f"hf:{here}").missing() is None
    assert parse_spec(f"hf:{here}/gone@random").missing() == here / "gone"
    assert parse_spec(f"torchvision:resnet50@{here}/w.pth").missing() == here / "w.pth"
    for text in ("torchvision:resnet50", "torchvision:resnet50@random", "hf:gpt2", "hf:openai/clip#v1"):
        assert parse_spec(text).missing() is None


@pytest.fixture
def moved(tiny_bert):
    """The specification of the text encoder of the shared run and store, which lies elsewhere during a test."""
    elsewhere = tiny_bert.with_name("elsewhere")
    tiny_bert.rename(elsewhere)
    yield f"hf:{elsewhere}"
    elsewhere.rename(tiny_bert)


def test_a_text_encoder_that_has_moved_is_asked_for_by_every_command_that_loads_it(
    run_dir, store_file, drawn, tiny_bert, moved, tmp_path, fails
):
    (tmp_path / "captions.txt").write_text("a red circle\n")
    cpu = ("--device", "cpu")
    calls = [
        ("search", "--run", run_dir, "--query", "a red circle", *cpu),
        ("verify", store_file, "--sample", "3", *cpu),
        ("index", "--run", run_dir, "--captions", tmp_path / "captions.txt", "--index", tmp_path / "captions", *cpu),
        ("finetune", "--run", run_dir, "--data", drawn, "--store", store_file, "--out", tmp_path / "tuned", *cpu),
    ]
    for call in calls:
        assert fails(*call) == (
            f"the text encoder was at {tiny_bert}, and is not there any more; name its new place: "
            "--text-encoder hf:NEW_PATH"
        )


def test_images_are_indexed_without_the_text_encoder(run_dir, drawn, moved, tmp_path, run):
    (tmp_path / "images").mkdir()
    for path in sorted(drawn.rglob("*.jpg"))[:2]:
        shutil.copy(path, tmp_path / "images")
    call = ("index", "--run", run_dir, "--images", tmp_path / "images", "--index", tmp_path / "index")
    assert "2 images: 2 added" in run(*call, "--device", "cpu").stderr
    assert "2 images: up to date" in run(*call, "--device", "cpu").stderr


def test_an_encoder_that_has_moved_is_taken_from_its_new_place(run_dir, store_file, moved, tmp_path, run):
    (tmp_path / "captions.txt").write_text("a red circle\na blue star\n")
    new_place = ("--text-encoder", moved, "--device", "cpu")
    assert "hits" in run("search", "--run", run_dir, "--query", "a red circle", "--json", *new_place).stdout
    run("verify", store_file, "--sample", "3", *new_place)
    index = tmp_path / "captions"
    run("index", "--run", run_dir, "--captions", tmp_path / "captions.txt", "--index", index, *new_place)
