"""What does a fit cost, beside its bare matrix products, and beside training that encodes everything in every epoch?

    python benchmarks/bench_fit.py [--out FILE.json]

Made-up features of Flickr8k's size and of ResNet50's and DistilBERT's dimensions (6,000 train images, two views, five
captions each), so noisy that recall rises until the last epoch, as it does on photographs; default heads and settings,
in one process. In each round: a fit as far as its heads, chosen and fitted again with the validation images; the whole
``fit``, embeddings of everything and biases included; and, before and after, the products of its steps alone, on
tensors that are ready: two projections, the similarities, and the four products of their way back. Then, with random
weights, measured steps of the "simple CLIP" way: each row a caption with its image, both encoders passed forward and
back; and, more kindly, both encoders frozen, in evaluation mode, each image passed once an epoch. Both are
extrapolated to all epochs.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

TRAIN, HELD_OUT, EACH, VIEWS, LATENT = 6000, 1000, 5, 2, 256
DIMS = 2048 + 1024, 3 * 768  # of the layers that the default settings take
ROWS, STEPS = 16, 4  # of a measured batch of the simple way, and how many are measured


def main() -> None:
    """Parses the options and prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extract-seconds", type=float, help="of the dataset, as measured; else it is left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from onceover import cli  # sets what torch reads when it starts
    from onceover.configs.schema import load_config
    from onceover.extract.store import FeatureStore

    assert cli
    config = load_config(ROOT / "configs/config.yaml", [f"training.num_epochs={options.epochs}"])
    result: dict = {"machine": machine(), "epochs": options.epochs}
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder))
        with FeatureStore(Path(folder) / "store.h5") as store:
            rounds = [one_round(store, Path(folder) / "run", config) for _ in range(options.rounds)]
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    result["seconds"] = {name: round(value, 2) for name, value in medians.items()}
    result["every round"] = rounds
    for name in ("heads", "whole fit"):
        result[f"{name} / products"] = round(statistics.median(one[name] / one["products"] for one in rounds), 2)
    simple = {name: value * options.epochs for name, value in simple_epoch().items()}
    result["extrapolated seconds"] = {name: round(value) for name, value in simple.items()}
    whole = medians["whole fit"] + (options.extract_seconds or 0)
    what = "fit and extraction" if options.extract_seconds else "fit"
    result |= {f"{name} / {what}": round(value / whole, 1) for name, value in simple.items()}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def make_store(folder: Path, train: int = TRAIN, held_out: int = HELD_OUT, dims: tuple[int, int] = DIMS) -> None:
    """Writes ``store.h5``, imported: a feature is a noisy image of a noisy copy of its image's vector.

    Args:
        train, held_out: how many images. dims: of the features of a view and of a caption.
    """
    from onceover.extract.importing import import_features

    generator = np.random.default_rng(0)
    latent = generator.standard_normal((train + held_out, LATENT), np.float32)
    for name, dim, each in (("images", dims[0], VIEWS), ("texts", dims[1], EACH)):
        mapping = generator.standard_normal((LATENT, dim), np.float32)
        copies = latent[:, None] + 2 * generator.standard_normal((len(latent), each, LATENT), np.float32)
        noise = generator.standard_normal((len(latent), each, dim), np.float32)
        features = copies @ mapping / LATENT**0.5 + 3 * noise
        np.save(folder / f"{name}.npy", features if name == "images" else features.reshape(-1, dim))
    with open(folder / "captions.csv", "w") as file:
        file.write("image,caption,split\n")
        for number in range(len(latent)):
            split = "train" if number < train else "dev"
            file.writelines(f"{number:05d}.jpg,image {number} said {each},{split}\n" for each in range(EACH))
    import_features(folder / "images.npy", folder / "texts.npy", folder / "captions.csv", folder / "store.h5")


def one_round(store, run: Path, config) -> dict[str, float]:
    """Seconds of a fit's heads, of the whole fit, and of the bare products of its steps."""
    from onceover.heads.batches import Batches
    from onceover.heads.schedule import scheduled
    from onceover.heads.training import fit

    roles = store.roles()
    training = scheduled(config, len(roles.train)).training
    parts = [
        (part, Batches(part, store.image_index, VIEWS, training.images_per_step, training.captions_per_image).steps)
        for part in (roles.train, roles.together().train)
    ]
    bare = [[seconds_a_step(config, len(part) / steps) for part, steps in parts]]
    start = time.perf_counter()
    made = fit(store, run, config, force=True)
    whole = time.perf_counter() - start
    bare.append([seconds_a_step(config, len(part) / steps) for part, steps in parts])
    epochs = made["epochs"][0], made["best_epochs"][0]
    each = [one * steps for one, (_, steps) in zip(np.mean(bare, 0), parts, strict=True)]
    products = float(np.dot(epochs, each))
    found = {"heads": made["seconds"], "whole fit": whole, "products": products, "epochs": sum(epochs)}
    print(found, file=sys.stderr, flush=True)
    return found


def seconds_a_step(
    config,
    pictures: float,
    stacked: int = 1,
    dims: tuple[int, int] = DIMS,
    seconds: float = 3.0,
    device: str = "cpu",
) -> float:
    """Seconds that the products of a step over so many images take, for ``stacked`` pairs of heads: the mean.

    A mean, since what it is compared with is the sum of many steps, with whatever held them up. A GPU is waited for
    after every ten steps.
    """
    import torch

    dim, pictures = config.model.embedding_dim, round(pictures)
    images = torch.randn(pictures, dims[0], device=device)
    texts = torch.randn(pictures * config.training.captions_per_image, dims[1], device=device)
    left, right = (torch.randn(stacked, each, dim, device=device) for each in dims)
    at_once = 10 if images.is_cuda else 1

    def products() -> None:
        one, other = images @ left, texts @ right
        scores = other @ one.transpose(1, 2)
        back_other, back_one = scores @ one, scores.transpose(1, 2) @ other
        images.T @ back_one, texts.T @ back_other

    products()
    synchronize(images.device)
    done, start = 0, time.perf_counter()
    while done < 5 or time.perf_counter() < start + seconds:
        for _ in range(at_once):
            products()
        synchronize(images.device)
        done += at_once
    return (time.perf_counter() - start) / done


def synchronize(device) -> None:
    """Waits until a GPU has done what it was given; a processor has."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def simple_epoch() -> dict[str, float]:
    """Seconds of an epoch over the train images and captions, trained end to end, and with frozen encoders."""
    import torch
    import torchvision
    from transformers import DistilBertConfig, DistilBertModel

    image, text = torchvision.models.resnet50(), DistilBertModel(DistilBertConfig())
    pixels, tokens = torch.randn(ROWS, 3, 224, 224), torch.randint(1000, (ROWS, 16))

    def timed(work) -> float:
        work()
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times) / ROWS

    def trained() -> None:
        (image(pixels).sum() + text(tokens).last_hidden_state.sum()).backward()

    end_to_end = timed(trained)
    image.eval()
    text.eval()
    with torch.inference_mode():
        picture, caption = timed(lambda: image(pixels)), timed(lambda: text(tokens))
    return {
        "trained end to end": TRAIN * EACH * end_to_end,
        "encoders frozen, encoded again in every epoch": TRAIN * picture + TRAIN * EACH * caption,
    }


def machine() -> dict:
    """What the numbers were measured on."""
    names = ("torch", "torchvision", "transformers", "numpy")
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
