"""BASE: small real inputs and results of every kind, made once by the program's own commands.

python -m reliability.workspace FOLDER
"""

import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
from filelock import FileLock

from reliability.trials import Command, Warm

TRAIN, DEV, TEST = 14, 5, 5
IMAGE_ENCODER = "torchvision:shufflenet_v2_x0_5@random"
FIT = ("--set", "training.num_epochs=2", "--set", "model.embedding_dim=8", "--set", "training.refit=false")
FIT += ("--set", "training.batch_size=8", "--set", "training.check_every=1", "--device", "cpu")
GRID = ("--grid", "model.temperature=0.05,0.1")
TUNE = ("--unfreeze", "image.conv5", "--set", "finetune.num_epochs=1", "--device", "cpu")


class Workspace:
    """The folder of BASE, with the paths and options that the trials' commands are made of.

    It is removed with its parent; ``scratch`` is where trials work.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = folder / "base"
        self.data = self.base / "data"
        self.bert = self.base / "bert"
        self.store = self.base / "s.h5"
        self.run = self.base / "run"
        self.other_run = self.base / "other"
        self.sweep = self.base / "sweep"
        self.index = self.base / "index"
        self.folder_index = self.base / "folder-index"
        self.activations = self.base / "activations"
        self.tuned = self.base / "tuned"
        self.imported = self.base / "imported"
        self.query = self.data / "query.jpg"
        self.archive = self.base / "Flickr8k_Dataset.zip"
        self.texts = self.base / "Flickr8k_text.zip"

    def scratch(self, name: str) -> Path:
        """An empty folder for one trial."""
        path = self.folder / "scratch" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def encoders(self, views: int = 1) -> tuple[str, ...]:
        """The options of ``extract`` that choose tiny encoders."""
        options = ("--image-encoder", IMAGE_ENCODER, "--text-encoder", f"hf:{self.bert}", "--text-layers", "last")
        return (*options, "--image-layers", "last", "--views", str(views), "--batch-size", "8", "--device", "cpu")


def build(folder: Path, warm: Warm) -> Workspace:
    """Makes BASE in ``folder``, unless it is there already or another process makes it at the moment."""
    workspace = Workspace(folder)
    with FileLock(folder / "base.lock"):
        if not (workspace.base / "DONE").exists():
            workspace.base.mkdir(parents=True)
            fill(workspace, warm)
            (workspace.base / "DONE").touch()
    return workspace


def fill(workspace: Workspace, warm: Warm) -> None:
    """Makes everything in BASE."""
    limits = {"cpu_seconds": 300, "wait_seconds": 600}

    def command(*arguments, function: str = "") -> None:
        ended = warm.run(Command(tuple(map(str, arguments)), function=function, **limits))
        if ended.code:
            raise RuntimeError(f"{arguments} ended with {ended.code}: {ended.stderr}")

    command(workspace.folder, function="reliability.workspace:draw")
    import_tables(workspace)
    zip_archives(workspace)
    run, store = workspace.run, workspace.store
    command("extract", "--data", workspace.data / "captions.csv", "--store", store, *workspace.encoders())
    command("fit", "--store", store, "--run", run, *FIT)
    command("fit", "--store", store, "--run", workspace.other_run, *FIT, "--set", "training.seed=1")
    command("sweep", "--store", store, "--out", workspace.sweep, *GRID, *FIT)
    command("index", "--run", run, "--index", workspace.index, "--device", "cpu")
    images = workspace.data / "images"
    command("index", "--run", run, "--images", images, "--index", workspace.folder_index, "--device", "cpu")
    data = workspace.data / "captions.csv"
    command("finetune", "--run", run, "--data", data, "--store", store, "--out", workspace.tuned, *TUNE)


def draw(folder: str) -> None:
    """Draws the images and makes the tiny text encoder. It computes, so it runs in a fork."""
    import torch
    from transformers import BertConfig, BertModel

    from onceover.extract.encoding.vocabulary import dataset_tokenizer
    from onceover.extract.layouts import read_dataset
    from onceover.extract.synthetic import draw_dataset

    workspace = Workspace(Path(folder))
    draw_dataset(workspace.data, TRAIN, DEV, TEST)
    tokenizer = dataset_tokenizer(read_dataset(workspace.data).captions)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    model.save_pretrained(workspace.bert)
    tokenizer.save_pretrained(workspace.bert)


def import_tables(workspace: Workspace) -> None:
    """Features as ``import`` takes them, with a table of captions in which each image has two."""
    generator = np.random.default_rng(0)
    workspace.imported.mkdir()
    np.save(workspace.imported / "images.npy", generator.standard_normal((24, 12), np.float32))
    np.save(workspace.imported / "texts.npy", generator.standard_normal((48, 10), np.float32))
    splits = ["train"] * TRAIN + ["dev"] * DEV + ["test"] * TEST
    lines = ["image,caption,split"]
    for number, split in enumerate(splits):
        lines += [f"{number:04d}.jpg,caption {turn} of image {number},{split}" for turn in (0, 1)]
    (workspace.imported / "captions.csv").write_text("\n".join(lines) + "\n")


def zip_archives(workspace: Workspace) -> None:
    """Archives like Flickr8k's."""
    with zipfile.ZipFile(workspace.archive, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((workspace.data / "images").iterdir())[:4]:
            archive.write(path, f"Flicker8k_Dataset/{path.name}")
    with zipfile.ZipFile(workspace.texts, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Flickr8k.token.txt", "".join(f"{n:04d}.jpg#0\tcaption {n}\n" for n in range(4)))
        archive.writestr("Flickr_8k.trainImages.txt", "0000.jpg\n0001.jpg\n")


if __name__ == "__main__":
    with Warm(Path(sys.argv[1])) as started:
        build(Path(sys.argv[1]), started)
