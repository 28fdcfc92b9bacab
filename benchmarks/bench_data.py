"""What limits recall: how much do more images, or more captions of an image, bring?

    python benchmarks/bench_data.py --store STORE.h5 [--out FILE.json] [--figures DIR]

The default heads, fitted on a part of the train images with all their captions, in as many more epochs, so that all
take as many steps; and on all train images with some of their captions. Each is drawn anew for each seed. What is
told is the best epoch's rsum on the validation images, which are always the same. A caption that is alone has no other
one to be varied by. Captions are standardised as all of the part's images' captions are.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench_fit import ROOT, machine

PARTS = (1 / 4, 1 / 2, 1)  # of the train images
CAPTIONS = (1, 2, 3, 5)  # of each image, at most


def main() -> None:
    """Parses the options, prints the result as JSON and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    from onceover import cli  # sets what torch reads when it starts
    from onceover.extract.store import FeatureStore

    assert cli
    result: dict = {"machine": machine(), "pictures": {}, "captions": {}}
    with FeatureStore(options.store) as store:
        for what, size, rsum in measured(store, options.seeds):
            result[what].setdefault(size, []).append(round(rsum, 1))
            print(what, size, round(rsum, 1), file=sys.stderr, flush=True)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if options.figures:
        from onceover.analysis.drawing import draw_all

        draw_all({"data": lambda: draw(result)}, options.figures)


def measured(store, seeds: int) -> Iterator[tuple[str, int, float]]:
    """(``pictures`` or ``captions``, how many, rsum on the validation images) for each fit."""
    from onceover.configs.schema import load_config
    from onceover.heads.schedule import scheduled

    roles = store.roles()
    everything = np.arange(len(store.image_index))
    for seed in range(seeds):
        config = load_config(ROOT / "configs/config.yaml", [f"training.seed={seed}"])
        config = scheduled(config, len(roles.train))
        epochs, looks = config.training.epochs, config.training.check_every
        generator = np.random.default_rng(seed)
        order, place = generator.permutation(roles.train), _place(store.image_index, generator)
        for part in PARTS:
            pictures = np.sort(order[: round(part * len(order))])
            longer = {"num_epochs": round(epochs / part), "check_every": round(looks / part)}
            training = dataclasses.replace(config.training, **longer, patience=0)
            rsum = fitted(store, pictures, everything, dataclasses.replace(config, training=training))
            yield "pictures", len(pictures), rsum
        yield "captions", max(CAPTIONS), rsum  # the whole part's, which is the last one
        for most in sorted(CAPTIONS)[:-1]:
            yield "captions", most, fitted(store, roles.train, np.flatnonzero(place < most), config)


def fitted(store, pictures: np.ndarray, captions: np.ndarray, config) -> float:
    """The rsum that heads reach which see some train images, and of their captions some, both rows of the store."""
    import torch

    from onceover.heads.stacking import train_epochs
    from onceover.heads.training_data import TrainingData

    data = TrainingData(store, dataclasses.replace(store.roles(), train=pictures), torch.device("cpu"), 2**34)
    trial, (chunks, image_index) = data.new_trial(config), data.chunks_of(config)
    seen = np.full_like(image_index, -1)  # no image's, so that no batch has it
    seen[captions] = image_index[captions]
    while not trial.finished:
        train_epochs([trial], chunks, seen, trial.until_validation)
        data.validate(trial)
    return trial.best_rsum


def _place(image_index: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each caption's place among those of its image, in an order drawn at random."""
    order = np.lexsort((generator.random(len(image_index)), image_index))
    counts = np.bincount(image_index)
    place = np.empty_like(image_index)
    place[order] = np.arange(len(image_index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def draw(result: dict):
    """Means and the range over seeds, against the images and against the captions of each."""
    from matplotlib.figure import Figure

    from onceover.analysis.drawing import IMAGE_COLOUR, WIDTH

    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    labels = {"pictures": "train images, with all their captions", "captions": "captions of an image, at most"}
    for axes, (what, label) in zip(figure.subplots(1, 2, sharey=True), labels.items(), strict=True):
        sizes, rsums = zip(*sorted(result[what].items()), strict=True)
        means = [statistics.mean(each) for each in rsums]
        lowest = [min(each) for each in rsums]
        highest = [max(each) for each in rsums]
        axes.fill_between(sizes, lowest, highest, color=IMAGE_COLOUR, alpha=0.2)
        axes.plot(sizes, means, color=IMAGE_COLOUR, marker="o")
        axes.margins(0.1)
        for size, mean in zip(sizes, means, strict=True):
            axes.annotate(f"{mean:.0f}", (size, mean), textcoords="offset points", xytext=(0, 9), ha="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set(xlabel=label)
    figure.axes[0].set_ylabel("rsum on the validation images")
    figure.suptitle("Means over seeds; bands: from the lowest to the highest")
    return figure


if __name__ == "__main__":
    main()
