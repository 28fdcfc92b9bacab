"""What does fine-tuning cost: a cached step beside its bare arithmetic, and memory with and without gradient caching?

    python benchmarks/bench_finetune.py [--out FILE.json]

MobileNetV2 (1.0, 224 pixels) and a BERT of MiniLM's size, with random weights, on noise with captions of random words;
the default layers are unfrozen: three blocks and the last convolution, and two blocks. In each round the same batch is
trained on (loading, heads, loss, backward, clipping and AdamW included), and its bare arithmetic is run: the unfrozen
modules alone, forward and backward, on tensors that are ready. Memory is what a process of its own takes at most for
two steps, AdamW's averages included, at an effective batch of 512 images and 2,560 captions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

CHOSEN = {"image": ["last3"], "text": ["last2"]}
EACH, WORDS = 5, 2000
LENGTHS = 11.8, 3.9  # of Flickr8k's captions, in words: mean and deviation
PARTS = 64  # images that memory holds at a time with gradient caching


def main() -> None:
    """Parses the options and prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="of the steps that are timed")
    parser.add_argument("--large-batch", type=int, default=512, help="of the steps whose memory is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("FOLDER", "MICRO_BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory(Path(options.memory_of[0]), options.large_batch, int(options.memory_of[1])))
        return
    from bench_fit import machine

    result: dict = {"machine": machine(), "batch": options.batch_size, "large batch": options.large_batch}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), max(options.batch_size, options.large_batch))
        rounds = times(Path(folder), options.batch_size, options.rounds)
        result["seconds a step"] = {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
        result["step / bare"] = round(statistics.median(one["step"] / one["bare"] for one in rounds), 3)
        result["every round"] = rounds
        result["MiB of a step"] = {
            name: child(Path(folder), options.large_batch, size)
            for name, size in (("gradient caching", PARTS), ("without", options.large_batch))
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def prepare(folder: Path, pictures: int, held_out: int = 64, width: float = 1.0) -> None:
    """Encoders, data, store, run and cached activations in ``folder``, with so many images to train on.

    Args:
        width: of the encoders' layers, as a share of the usual one.
    """
    import torch
    from PIL import Image
    from transformers import BertConfig, BertModel, MobileNetV2Config, MobileNetV2ImageProcessor, MobileNetV2Model

    from onceover.configs.schema import Config, ExtractConfig, TrainingConfig
    from onceover.extract.encoding.vocabulary import dataset_tokenizer
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import extract
    from onceover.extract.store import FeatureStore
    from onceover.heads.training import fit

    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("abcdefghijklmnop"), 7)) for _ in range(WORDS)])
    (folder / "data").mkdir()
    with open(folder / "data/captions.csv", "w") as file:
        file.write("image,caption,split\n")
        for number in range(pictures + held_out):
            blots = generator.integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(blots).resize((256, 256)).save(folder / f"data/{number}.jpg")
            split = "train" if number < pictures else "dev" if number % 2 else "test"
            for length in generator.normal(*LENGTHS, EACH).round().clip(3, 35).astype(int):
                file.write(f"{number}.jpg,{' '.join(generator.choice(words, length))},{split}\n")
    dataset = read_dataset(folder / "data")
    torch.manual_seed(0)
    MobileNetV2Model(MobileNetV2Config(depth_multiplier=width)).save_pretrained(folder / "image")
    MobileNetV2ImageProcessor().save_pretrained(folder / "image")
    tokenizer = dataset_tokenizer(dataset.captions)
    dims = round(384 * width)
    sizes = {"hidden_size": dims, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 4 * dims}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    encoders = ExtractConfig(image_encoder=f"hf:{folder / 'image'}", text_encoder=f"hf:{folder / 'text'}")
    extract(dataset, folder / "store.h5", encoders, device="cpu")
    config = Config(encoders, training=TrainingConfig(num_epochs=1))
    with FeatureStore(folder / "store.h5") as store:
        fit(store, folder / "run", config)
        training(store, folder, pictures, pictures)


def training(store, folder: Path, batch_size: int, micro_batch: int, device: str = "cpu"):
    """A fine-tuning at its first step, whose activations are cached."""
    import torch

    from onceover.configs.schema import FinetuneConfig
    from onceover.heads.checkpoint import load_run
    from onceover.heads.finetune import cache, towers_of
    from onceover.heads.finetune_loop import Training
    from onceover.heads.workers import Workers

    settings = FinetuneConfig(batch_size=batch_size, micro_batch=micro_batch)
    run = load_run(folder / "run").trained_pair()
    where = torch.device(device)
    specs = {kind: f"hf:{folder / kind}" for kind in CHOSEN}
    towers = towers_of(store, run, folder / "data", settings, CHOSEN, specs, where)
    cache(towers, folder / "activations")
    return Training(store, run, towers, settings, Workers(where))


def first_batch(store, batch_size: int):
    """The first batch of an epoch over the train images."""
    from onceover.heads.batches import Batches

    views = store.image_features.shape[1]
    batches = Batches(store.roles().train, store.image_index, views, batch_size, captions_per_image=5)
    return next(batches.epoch(np.random.default_rng(0)))


def times(folder: Path, batch_size: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of a step and of its bare arithmetic, in each round."""
    from onceover.extract.store import FeatureStore

    found = []
    with FeatureStore(folder / "store.h5") as store:
        work = training(store, folder, batch_size, batch_size)
        image, text = (work.towers[kind].encoder.model for kind in ("image", "text"))
        batch = first_batch(store, batch_size)
        ready = tensors(work.loader.load(0, 0, batch))
        for _ in range(rounds + 1):
            start = time.perf_counter()
            work.train(work.loader.load(0, 0, batch), 1e-6)
            middle = time.perf_counter()
            bare(image, text, *ready)
            found.append({"step": middle - start, "bare": time.perf_counter() - middle})
    return found[1:]  # the first one warms up


def tensors(step, device: str = "cpu") -> tuple[list, list]:
    """The inputs of the unfrozen modules on a device: maps (b, C, H, W), and tokens (b, L, D) with their masks."""
    import torch

    maps = [batch.inputs.to(device).float().permute(0, 3, 1, 2) for batch in step.micro_batches["image"]]
    texts = []
    for batch in step.micro_batches["text"]:
        lengths = torch.tensor([len(ids) for ids in batch.inputs.token_ids])
        tokens = batch.inputs.activations.to(device).float()
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        texts.append((tokens, mask.to(device)))
    return maps, texts


def bare(image, text, maps: list, texts: list) -> None:
    """Forward and backward of the unfrozen modules."""
    for states in maps:
        for layer in image.layer[-3:]:
            states = layer(states)
        image.conv_1x1(states).mean((2, 3)).sum().backward()
    for states, mask in texts:
        for layer in text.encoder.layer[-2:]:
            states = layer(states, mask[:, None, None])
            if isinstance(states, tuple):  # so earlier versions of transformers give them
                states = states[0]
        (states * mask[..., None]).sum(1).sum().backward()
    for model in (image, text):
        model.zero_grad()


def child(folder: Path, batch_size: int, micro_batch: int) -> float:
    """MiB that steps take at most, measured in a process of its own."""
    call = [sys.executable, __file__, "--memory-of", str(folder), str(micro_batch), "--large-batch", str(batch_size)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
    return float(done.stdout.splitlines()[-1])


def memory(folder: Path, batch_size: int, micro_batch: int) -> float:
    """MiB by which this process grows at most while it takes two steps."""
    from onceover.base.memory import peak_memory
    from onceover.extract.store import FeatureStore

    with FeatureStore(folder / "store.h5") as store:
        work = training(store, folder, batch_size, micro_batch)
        batch = first_batch(store, batch_size)

        def steps() -> None:
            for _ in range(2):
                work.train(work.loader.load(0, 0, batch), 1e-6)

        return round(peak_memory(steps) / 2**20, 1)


if __name__ == "__main__":
    main()
