"""The examples of docs/extending.md: each is made a package with its entry point, and its errand is carried out."""

import json
import re
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import test_backends
import test_encoder_libraries
from PIL import Image

import onceover
from onceover.analysis.figures import FIGURES
from onceover.extract.backends import BACKENDS
from onceover.extract.dataset.alone import read_images
from onceover.extract.encoders import ENCODERS
from onceover.extract.encoding.image import ImageEncoder
from onceover.extract.engines import ENGINES
from onceover.extract.layouts import LAYOUTS, read_dataset
from onceover.extract.pipeline import extract
from onceover.heads.losses import LOSSES

PAGE = (Path(__file__).resolve().parent.parent / "docs/extending.md").read_text(encoding="utf-8")


def blocks(section, language):
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def install(outside):
    """Makes a section's example a package, by the entry point that the section shows; returns the item's name."""

    def add(section: str) -> str:
        [toml] = blocks(section, "toml")
        [(group, items)] = tomllib.loads(toml)["project"]["entry-points"].items()
        [name] = items
        outside(group, name, "\n".join(blocks(section, "python")))
        return name

    return add


@pytest.fixture
def photos(drawn):
    """Some of the drawn images, by name."""
    return {path.name: path.read_bytes() for path in sorted(drawn.rglob("images/*.jpg"))[:8]}


def test_a_layout(install, photos, tmp_path, run, extract_config):
    assert install("A dataset layout") in LAYOUTS.names()
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = [json.dumps({"picture": name, "title": f"Thing {number} ."}) for number, name in enumerate(photos)]
    (folder / "products.jsonl").write_text("\n".join(lines) + "\n")
    for name, content in photos.items():
        (folder / name).write_bytes(content)
    dataset = read_dataset(folder)
    assert (dataset.layout, dataset.ids) == ("shopfolder", [*photos])
    assert dataset.captions == [f"Thing {number} ." for number in range(8)]
    encoders = ("--image-encoder", extract_config.image_encoder, "--text-encoder", extract_config.text_encoder)
    run("extract", "--data", folder, "--store", tmp_path / "photos.h5", "--device", "cpu", *encoders)
    with onceover.FeatureStore(tmp_path / "photos.h5") as store:
        assert store.captions == dataset.captions


def test_a_layout_whose_images_are_no_files(install, photos, tmp_path, extract_config):
    assert install("A layout whose images are no files") in LAYOUTS.names()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number, (name, content) in enumerate(photos.items()):
            archive.writestr(name, content)
            archive.writestr(name.replace(".jpg", ".txt"), f"Thing {number} .")
    dataset = read_dataset(tmp_path / "photos.zip")
    assert (dataset.layout, dataset.ids) == ("zip", [*photos])
    assert [dataset.images.open(key) for key in dataset.paths] == [*photos.values()]
    assert dataset.images.stat("no such key") == (-1, -1)
    store = onceover.extract_features(tmp_path / "photos.zip", tmp_path / "s.h5", config=extract_config, device="cpu")
    with store:
        assert store.image_ids == [*photos]
        assert np.isfinite(store.image_features[:]).all()


def test_an_encoder_library(install, drawn, tmp_path, run):
    assert install("An encoder library") in ENCODERS.names()
    library = ENCODERS.load("tiny")
    test_encoder_libraries.check_spec(library, "tiny:8")
    store, folder = tmp_path / "tiny.h5", tmp_path / "run"
    tiny = ("--image-encoder", "tiny:8", "--text-encoder", "tiny:8", "--device", "cpu")
    run("extract", "--data", drawn, "--store", store, *tiny)
    assert "up to date" in run("extract", "--data", drawn, "--store", store, *tiny).stderr
    smaller = run("extract", "--data", drawn, "--store", store, *tiny, "--image-encoder", "tiny:4", code=1)
    assert "holds other image features" in smaller.stderr
    run("verify", store, "--sample", 5, "--device", "cpu")
    run("fit", "--store", store, "--run", folder, "--set", "model.embedding_dim=16", "--set", "training.num_epochs=9")
    hits = run("search", "--run", folder, "--query", "a red circle", "--json", "--device", "cpu").stdout
    assert len(json.loads(hits)["hits"]) == 5


def test_a_loss(install, store, tmp_path, fit_config, changed):
    import torch

    assert install("A loss") in LOSSES.names()
    hinge = LOSSES.load("hinge")
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 1, 2]]
    owners = torch.tensor([0, 0, 1, 2])
    assert float(hinge.loss(images, texts, owners, {})) == 0  # perfect, with a margin of 1
    assert float(hinge.loss(images, 0 * texts, owners, {})) == pytest.approx(2 * hinge.MARGIN)
    stacked = hinge.loss(images.expand(2, 3, 3), texts.expand(2, 4, 3), owners, {})
    assert stacked.tolist() == [0, 0]
    run = onceover.fit(store, tmp_path / "run", changed(fit_config, training={"loss": "hinge", "num_epochs": 12}))
    assert run.provenance["selection"]["rsum"] > 0
    assert run.heads.loss == "hinge"


def test_a_backend(install, tiny_resnet, tiny_bert):
    name = install("A backend")
    assert name in BACKENDS.names()
    test_backends.check_contract(name, f"hf:{tiny_resnet}", f"hf:{tiny_bert}")
    encoder = ImageEncoder("torchvision:shufflenet_v2_x0_5@random", backend=name, device="cpu")
    pixels = encoder.pixels(Image.new("RGB", (50, 40)))
    assert encoder.encode(pixels.expand(9, *pixels.shape)).shape[0] == 9


def test_a_figure(install, run, run_dir, tmp_path, without_pdf):
    assert install("A figure") in FIGURES.names()
    assert "drawing scores" in run("plot", "--run", run_dir, "--out", tmp_path).stderr
    with Image.open(tmp_path / "scores.png") as drawn:
        assert min(drawn.size) > 200
    assert (tmp_path / "scores.svg").exists()


def test_an_engine(install, drawn, store, tmp_path, extract_config, monkeypatch):
    name = install("An engine")
    assert name in ENGINES.names()
    monkeypatch.setattr(ENGINES.load(name), "WORKERS", 1)
    extract(read_images(drawn / "images"), tmp_path / "pool.h5", extract_config, device="cpu", engine=name)
    with onceover.FeatureStore(tmp_path / "pool.h5") as made:
        assert made.provenance["image"]["engine"] == name
        np.testing.assert_array_equal(made.image_features[:], store.image_features[:])


def test_every_section_shows_how_it_is_installed_and_used():
    for section in re.findall(r"^## (.+)$", PAGE, re.MULTILINE):
        assert f"(#{section.lower().replace(' ', '-')})" in PAGE
        assert blocks(section, "python")
        assert blocks(section, "toml")
