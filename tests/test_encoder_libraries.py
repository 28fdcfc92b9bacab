"""The contract of encoder libraries, over all that are registered, and a library of another package."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from onceover.base.files import files_within
from onceover.base.registry import RegistryError
from onceover.extract.encoder_files import ENCODER_FILES, TOKENIZER_FILES
from onceover.extract.encoders import ENCODERS, EncoderError, change_stamp, library_of, parse_spec
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.encoding.text import TextEncoder

CAPTIONS = ["A red circle .", "On the left there is a blue star .", "", "star " * 300]


def check_contract(library, folder):
    """Checks a library on its own example, for each kind of encoder that it has."""
    assert library.FORM.startswith(f"{library.NAME}:")
    specs = library.write_example(folder)
    assert specs
    assert set(specs) <= {"image", "text"}
    for text in specs.values():
        check_spec(library, text)
    if "image" in specs:
        check_image(specs["image"], folder / "saved")
    else:
        with pytest.raises(EncoderError, match="is no image encoder"):
            ImageEncoder(specs["text"], device="cpu")
    if "text" in specs:
        check_text(specs["text"], folder / "saved text")
    else:
        with pytest.raises(EncoderError, match="is no text encoder"):
            TextEncoder(specs["image"], device="cpu")


def check_spec(library, text):
    spec = parse_spec(text)
    assert (spec.text, spec.library) == (text, library.NAME)
    assert parse_spec(spec.located()).located() == spec.located()
    assert library_of(spec).NAME == library.NAME
    stamp = change_stamp(spec, 0)
    assert json.loads(json.dumps(stamp)) == stamp == change_stamp(spec, 0)
    assert not spec.random or change_stamp(spec, 1) != stamp
    with pytest.raises(EncoderError, match="is no encoder specification; write .*") as error:
        parse_spec(f"{library.NAME}:")
    assert library.FORM in str(error.value)


def check_image(text, folder):
    encoder = ImageEncoder(text, layers="auto", views=2, device="cpu")
    check_frozen(encoder)
    assert ImageEncoder(text, layers="auto", views=2, device="cpu").recipe == encoder.recipe
    assert {"architecture", "preprocessing", "pooling", "weights"} < set(encoder.recipe)
    image = Image.linear_gradient("L").convert("RGB").resize((70, 50))
    pixels = np.stack([encoder.pixels(image.rotate(angle)).numpy() for angle in (0, 30, 100)])
    features = encode_images(encoder, pixels)
    assert features.shape[:2] == (3, 2)
    assert np.isfinite(features).all()
    assert len(np.unique(features[:, 0].round(6), axis=0)) == 3
    np.testing.assert_allclose(encode_images(encoder, pixels[1:2])[0], features[1], rtol=1e-3, atol=1e-5)
    plain = ImageEncoder(text, layers="auto", views=2, device="cpu", plain=True)
    assert plain.recipe == encoder.recipe
    np.testing.assert_allclose(encode_images(plain, pixels), features, rtol=1e-3, atol=1e-5)
    saved = ImageEncoder(plain.save(folder), layers="auto", views=2, device="cpu", plain=True)
    check_saved(folder, saved, plain)
    np.testing.assert_array_equal(encode_images(saved, pixels), encode_images(plain, pixels))


def check_text(text, folder):
    encoder = TextEncoder(text, layers="auto", captions=CAPTIONS, device="cpu")
    check_frozen(encoder)
    assert {"architecture", "weights", "tokenizer", "layers"} < set(encoder.recipe)
    assert set(encoder.tokenizer_files) <= TOKENIZER_FILES
    features, truncated = encoder.encode(CAPTIONS)
    assert features.shape[0] == len(CAPTIONS)
    assert np.isfinite(features).all()
    assert truncated.tolist() == [False, False, False, True]
    assert np.abs(features[0] - features[1]).max() > 1e-3
    np.testing.assert_allclose(encoder.encode(CAPTIONS[:1])[0], features[:1], rtol=1e-3, atol=1e-5)
    files = encoder.tokenizer_files
    again = TextEncoder(text, layers="auto", tokenizer_files=files, device="cpu")
    assert again.recipe == encoder.recipe
    np.testing.assert_array_equal(again.encode(CAPTIONS)[0], features)
    plain = TextEncoder(text, layers="auto", tokenizer_files=files, device="cpu", plain=True)
    saved = TextEncoder(plain.save(folder), layers="auto", device="cpu", plain=True)
    check_saved(folder, saved, plain)
    np.testing.assert_array_equal(saved.encode(CAPTIONS)[0], plain.encode(CAPTIONS)[0])


def encode_images(encoder, pixels):
    import torch

    return encoder.encode(torch.from_numpy(pixels))


def check_frozen(encoder):
    assert json.loads(json.dumps(encoder.recipe)) == encoder.recipe
    assert not any(module.training for module in encoder.model.modules())
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def check_saved(folder, saved, original):
    assert saved.recipe["weights"] == original.recipe["weights"]
    names = files_within(folder)
    assert names
    assert all(ENCODER_FILES.fullmatch(name) for name in names), names


@pytest.mark.parametrize("name", ENCODERS.names())
def test_a_registered_library_keeps_the_contract(tmp_path, name):
    check_contract(ENCODERS.load(name), tmp_path)


def test_trap_stores_know_libraries_by_these_prefixes():
    names = {name: ENCODERS.load(name).NAME for name in ("huggingface", "torchvision")}
    assert names == {"huggingface": "hf", "torchvision": "torchvision"}


def test_specifications_are_parsed_and_stamped_without_torch(tmp_path):
    specs = []
    for name in ENCODERS.names():
        (tmp_path / name).mkdir()
        specs += ENCODERS.load(name).write_example(tmp_path / name).values()
    script = (
        "import sys\n"
        "from onceover.extract.encoders import change_stamp, parse_spec\n"
        "for text in sys.argv[1:]:\n    change_stamp(parse_spec(text), 0)\n"
        "print(sorted({'torch', 'torchvision', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, *specs], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TOY = """
import zlib
from pathlib import Path

from onceover.extract.encoders import ImageModel, PreprocessSteps, Spec, TextModel, file_stamps

NAME = "toy"
FORM = "toy:NAME_OR_FOLDER"
WORDS = 1000

def parse(text):
    name = text.removeprefix("toy:")
    return Spec(text, NAME, name, "" if Path(name).is_dir() else "random")

def change_stamp(spec):
    return {"name": spec.name, "files": file_stamps(sorted(Path(spec.name).glob("*.safetensors")))}

def load_image(spec, seed):
    from torch import nn

    module = loaded(spec, seed, lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24)))
    steps = PreprocessSteps(lambda image: levels(pixels(image)), pixels, levels, 32, 0)
    recipe = {"architecture": "toy", "preprocessing": "squashed to 32", "pooling": "linear"}
    return ImageModel(module, steps, lambda module, batch: module(batch), recipe)

def load_text(spec, seed, captions, tokenizer_files):
    from torch import nn

    module = loaded(spec, seed, lambda: nn.Embedding(WORDS + 1, 16))
    return TextModel(
        module=module,
        tokenizer=Tokenizer(),
        states=lambda module, inputs: {"last": module(inputs["input_ids"]), 0: module(inputs["input_ids"])},
        words=lambda module, ids: module(ids),
        recipe={"architecture": "toy"},
        max_length=50,
        depth=0,
    )

def save(spec, kind, module, folder):
    import safetensors.torch

    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(module.state_dict(), folder / "model.safetensors")
    return f"toy:{folder}"

def write_example(folder):
    return {"image": "toy:one", "text": "toy:two"}

def loaded(spec, seed, make):
    import safetensors.torch
    from onceover.extract.encoding.weights import seeded

    with seeded(seed):
        module = make()
    if not spec.random:
        module.load_state_dict(safetensors.torch.load_file(Path(spec.name) / "model.safetensors"))
    return module

def pixels(image):
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1)

def levels(pixels):
    return pixels.float() / 255

class Tokenizer:
    files = {"vocab.txt": b"words are hashed"}
    pad_id = 0
    frame_ids = []

    def token_ids(self, captions, max_length):
        ids = [[1 + zlib.crc32(word.encode()) % WORDS for word in caption.lower().split()] for caption in captions]
        return [(row or [WORDS])[:max_length] for row in ids]
"""


def test_a_library_of_another_package_keeps_the_contract_too(outside, tmp_path):
    outside("onceover.encoders", "toy", TOY)
    assert "toy" in ENCODERS.names()
    check_contract(ENCODERS.load("toy"), tmp_path)


def test_another_package_adds_a_library_that_a_dataset_is_encoded_and_searched_with(outside, drawn, tmp_path, run):
    outside("onceover.encoders", "toy", TOY)
    store = tmp_path / "toy.h5"
    encoders = ("--image-encoder", "toy:one", "--text-encoder", "toy:two", "--device", "cpu")
    run("extract", "--data", drawn, "--store", store, *encoders)
    assert "up to date" in run("extract", "--data", drawn, "--store", store, *encoders).output
    run("verify", store, "--sample", "5", "--device", "cpu")
    folder = tmp_path / "run"
    run("fit", "--store", store, "--run", folder, "--set", "model.embedding_dim=16", "--set", "training.num_epochs=30")
    hits = run("search", "--run", folder, "--query", "a red circle", "--json", "--device", "cpu").stdout
    assert len(json.loads(hits)["hits"]) == 5
    image = next(drawn.rglob("*.jpg"))
    hits = run("search", "--run", folder, "--query", image, "--mode", "image2text", "--json", "--device", "cpu").stdout
    assert len(json.loads(hits)["hits"]) == 5


def test_a_broken_library_of_another_package_is_named(outside):
    outside("onceover.encoders", "broken", "import no_such_module_at_all")
    with pytest.raises(RegistryError, match="the encoder library 'broken' of the package outside-0 cannot be imported"):
        parse_spec("broken:model")


def test_a_prefix_that_two_libraries_claim_is_named(outside):
    outside("onceover.encoders", "other", TOY.replace('NAME = "toy"', 'NAME = "hf"'))
    with pytest.raises(EncoderError, match="the prefix hf: is claimed by several encoder libraries"):
        parse_spec("hf:bert")
