"""Do the default heads stand up to the baselines, however many images and captions there are to fit on?

    python benchmarks/bench_heads.py --store STORE.h5 [--features NAME=STORE.h5[:NUMBERS,NUMBERS] ...] [--aligned]
        [--split select] [--images 250,500,1000,2000,4000,6000] [--captions 1,5] [--seeds 3] [--config FILE.yaml]
        [--out FILE.json] [--figures DIR]

For each number of train images and of captions, and for each seed, so many images are drawn and imported as a store of
their own, with one split to measure; then everything is done as a user does it: ``fit`` with the default settings, and
the baselines of ``evaluate``, all fitted on the same images. ``trained`` is the default's trained heads alone, without
a correction for hubs: the default before there was more. Its and the default's differences from the best baseline are
paired query by query, the seeds pooled (``retrieval.metrics.compare``).

With ``--split select``, the default, nothing of dev is read: images are drawn from the train images without those of
the validation split, which are measured. ``--config`` measures other settings than the default ones. ``--features``
names further stores, or the first so many numbers of a store's features: ``"last layers=STORE.h5:1280,384"``.
``--aligned`` adds features that share a space, as a dual encoder's do: heads are fitted on one half of the train
images, and their embeddings of the others are the features.

An interrupted run is continued: ``--out`` keeps each cell as it is measured.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_fit import ROOT, machine

SIZES = (250, 500, 1000, 2000, 4000, 6000)
CAPTIONS = (1, 5)
OWN = ("default", "trained")  # the rows that are no baselines
ROWS = (*OWN, "zero_shot", "cca", "ridge", "text_knn", "image_knn")  # in the order of their colours
MEASURED = "dev"  # the split of a drawn store that is measured


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of images (N, V, D) and captions (M, E) with the caption map, and rows to draw from and to measure."""

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray
    train: np.ndarray
    measured: np.ndarray


def main() -> None:
    """Parses the options, measures what is not measured yet, prints the result as JSON and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--features", action="append", default=[], metavar="NAME=STORE.h5[:NUMBERS,NUMBERS]")
    parser.add_argument("--aligned", action="store_true")
    parser.add_argument("--split", choices=["select", "dev"], default="select")
    parser.add_argument("--images", type=numbers, default=list(SIZES))
    parser.add_argument("--captions", type=numbers, default=list(CAPTIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    from onceover import cli  # sets what torch reads when it starts

    assert cli
    result: dict = {"machine": machine(), "split": options.split, "settings": options.set, "cells": {}}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text())
    result["config"] = options.config.stem
    stores = {"all layers": str(options.store)}
    for text in options.features:
        name, _, stores[name] = text.partition("=")
    for name, place in stores.items():
        measure(name, lambda place=place: read_features(place, options.split), options, result)
    if options.aligned:
        measure("aligned", lambda: aligned_features(options), options, result)
    print(json.dumps(result, indent=2))
    if options.figures:
        from onceover.analysis.drawing import draw_all

        name = "heads" if result["config"] == "config" else f"heads-{result['config']}"
        draw_all({name: lambda: draw(result)}, options.figures)


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in text.split(",")]


def read_features(place: str, split: str) -> Features:
    """The features of a store, or the first so many numbers of them: ``STORE.h5:1280,384``.

    Args:
        split: what is measured, ``select`` or ``dev``.
    """
    from onceover.extract.store import FeatureStore

    path, _, columns = place.partition(":")
    image_dim, text_dim = numbers(columns) if columns else (None, None)
    with FeatureStore(path) as store:
        roles = store.roles()
        train = roles.train
        measured = roles.selection
        if split == "dev":
            train = roles.together().train
            measured = roles.report
        images = store.image_features[:][..., :image_dim]
        texts = store.text_features[:][:, :text_dim]
        return Features(images, texts, store.image_index, train, measured)


def aligned_features(options: argparse.Namespace) -> Features:
    """Embeddings of one half of the train images, and of those that are measured, by heads fitted on the other half."""
    from onceover.retrieval.embeddings import read_embeddings

    features = read_features(str(options.store), options.split)
    order = np.random.default_rng(0).permutation(features.train)
    half = len(order) // 2
    with tempfile.TemporaryDirectory() as folder:
        seen = np.sort(order[:half])
        rest = dataclasses.replace(features, measured=np.sort(np.concatenate([order[half:], features.measured])))
        write_store(Path(folder), rest, seen, max(CAPTIONS), 0)
        fitted(Path(folder), options, 0)
        embeddings = read_embeddings(Path(folder) / "run" / "embeddings.h5")
    # a drawn store's images are named by their rows
    rows = np.array([int(Path(name).stem) for name in embeddings.ids])
    is_measured = np.isin(rows, features.measured)
    is_train = np.isin(rows, order[half:])
    return Features(
        embeddings.images[:, None],
        embeddings.texts,
        embeddings.image_index,
        np.flatnonzero(is_train),
        np.flatnonzero(is_measured),
    )


def measure(name: str, read, options: argparse.Namespace, result: dict) -> None:
    """Measures the cells of some features that ``result`` does not hold yet. ``read``: gives the features."""
    cells = result["cells"]
    features = None
    for captions in options.captions:
        for size in options.images:
            key = f"{name}, {captions} captions, {size} images"
            if key in cells:
                continue
            features = features or read()
            if size > len(features.train):
                size = len(features.train)
                key = f"{name}, {captions} captions, {size} images"
                if key in cells:
                    continue
            cells[key] = {"features": name, "captions": captions, "images": size}
            cells[key] |= measured_cell(features, size, captions, options)
            print(key, json.dumps(cells[key]["rsum"]), cells[key]["differences"], file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=2) + "\n")


def measured_cell(features: Features, size: int, captions: int, options: argparse.Namespace) -> dict:
    """The rsum of each row with each seed, and the default's difference from the best baseline."""
    from onceover.retrieval.metrics import compare, report

    ranks: dict[str, list] = {}
    seconds = []
    dims = []
    for seed in range(options.seeds):
        drawn = np.random.default_rng(seed).permutation(features.train)[:size]
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder), features, np.sort(drawn), captions, seed)
            start = time.monotonic()
            own, dim = fitted(Path(folder), options, seed)
            seconds.append(round(time.monotonic() - start, 1))
            dims.append(dim)
            for name, pair in {**own, **baselines(Path(folder))}.items():
                ranks.setdefault(name, []).append(pair)
    rsums = {}
    for name, pairs in ranks.items():
        rsums[name] = [round(report([pair], draws=0)["rsum"], 1) for pair in pairs]
    best = max(rsums.keys() - {*OWN}, key=lambda name: statistics.mean(rsums[name]))
    differences = {}
    for name in OWN:
        difference = compare(ranks[best], ranks[name])
        differences[name] = [round(value, 1) for value in (difference["rsum"], *difference["rsum_ci"])]
    return {
        "rsum": rsums,
        "default_recalls": recalls(ranks["default"]),
        "best_baseline": best,
        "differences": differences,
        "dims": dims,
        "seconds": seconds,
    }


def recalls(pairs: list) -> dict[str, dict[str, float]]:
    """R@1, R@5 and R@10 of each direction in percent, the mean of the seeds."""
    from onceover.retrieval.metrics import report

    reports = [report([pair], draws=0) for pair in pairs]
    means: dict[str, dict[str, float]] = {}
    for direction in ("image_to_text", "text_to_image"):
        means[direction] = {}
        for name in ("R@1", "R@5", "R@10"):
            mean = statistics.mean(of_seed[direction][name] for of_seed in reports)
            means[direction][name] = round(mean, 1)
    return means


def write_store(folder: Path, features: Features, train: np.ndarray, captions: int, seed: int) -> None:
    """Imports ``store.h5``: some train images with some captions each, and the measured images with all of theirs."""
    from onceover.extract.importing import import_features

    generator = np.random.default_rng(seed)
    kept = np.zeros(len(features.image_index), bool)
    for image in train:
        own = np.flatnonzero(features.image_index == image)
        kept[generator.permutation(own)[:captions]] = True
    kept |= np.isin(features.image_index, features.measured)
    rows = np.flatnonzero(kept)
    order = np.unique(features.image_index[rows])
    is_train = np.isin(features.image_index[rows], train)
    np.save(folder / "images.npy", features.images[order])
    np.save(folder / "texts.npy", features.texts[rows])
    lines = [f"{image:05d}.jpg" for image in order]
    (folder / "ids.txt").write_text("\n".join(lines) + "\n")
    table = ["image,caption,split"]
    for row, image, in_train in zip(rows, features.image_index[rows], is_train, strict=True):
        table.append(f"{image:05d}.jpg,caption {row},{'train' if in_train else MEASURED}")
    (folder / "captions.csv").write_text("\n".join(table) + "\n")
    import_features(
        folder / "images.npy",
        folder / "texts.npy",
        folder / "captions.csv",
        folder / "store.h5",
        image_ids=folder / "ids.txt",
    )


def fitted(folder: Path, options: argparse.Namespace, seed: int) -> tuple[dict, int]:
    """The ranks of the heads that ``fit`` makes of ``store.h5``, and the dimensions of what is searched."""
    import torch

    from onceover.configs.schema import load_config
    from onceover.extract.store import FeatureStore
    from onceover.heads.training import fit
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.hubness import biases_of_split
    from onceover.retrieval.ranks import rank

    config = load_config(options.config, [*options.set, f"training.seed={seed}"])
    with FeatureStore(folder / "store.h5") as store:
        fit(store, folder / "run", config, device=torch.device("cpu"))
    embeddings = read_embeddings(folder / "run" / "embeddings.h5")
    vectors = embeddings.vectors_of(MEASURED)
    biases = biases_of_split(embeddings, MEASURED, embeddings.rerank)
    trained = embeddings.parts_of(MEASURED).get("trained", vectors)
    return {"default": rank(*vectors, **biases), "trained": rank(*trained)}, embeddings.images.shape[1]


def baselines(folder: Path) -> dict:
    """The ranks of the baselines that are fitted, or need no fit, on ``store.h5``, by name."""
    from onceover.extract.store import FeatureStore
    from onceover.retrieval.baseline_ranks import UNLEARNED, measure_baselines
    from onceover.retrieval.store_pairs import fitting_rows, images_of

    with FeatureStore(folder / "store.h5") as store:
        roles = store.roles()
        images = images_of(store, roles, MEASURED)
        rows = fitting_rows(store, roles, len(images), 2**33, refit=True)
        measured = measure_baselines(store, images, rows)
    return {name: baseline.ranks[0] for name, baseline in measured.items() if name not in UNLEARNED}


def draw(result: dict):
    """A panel for each kind of features and number of captions: rsum against the number of images, losses marked."""
    from matplotlib.figure import Figure

    from onceover.analysis.drawing import WIDTH

    names = {row: row for row in ROWS}
    if result["config"] != "config":
        names["default"] = f"{result['config']}.yaml"
    panels: dict[tuple, list[dict]] = {}
    for cell in result["cells"].values():
        panels.setdefault((cell["features"], cell["captions"]), []).append(cell)
    columns = len({captions for _, captions in panels})
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 2.4 * lines + 0.6), layout="constrained")
    axes_of_panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, ((name, captions), cells) in zip(axes_of_panels, sorted(panels.items()), strict=True):
        cells.sort(key=lambda cell: cell["images"])
        sizes = [cell["images"] for cell in cells]
        for row in cells[0]["rsum"]:
            means = [statistics.mean(cell["rsum"][row]) for cell in cells]
            width = 2 if row == "default" else 1
            colour = f"C{ROWS.index(row)}"
            axes.plot(sizes, means, color=colour, marker="o", markersize=3, linewidth=width, label=names[row])
        for row, marker in zip(OWN, ("x", "+"), strict=True):
            lost = [cell for cell in cells if cell["differences"][row][2] < 0]
            heights = [statistics.mean(cell["rsum"][row]) for cell in lost]
            label = f"{names[row]} loses to the best baseline"
            axes.plot([cell["images"] for cell in lost], heights, marker, color="black", zorder=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
        axes.set_title(f"{name}, {captions} captions each" if captions > 1 else f"{name}, one caption each")
        axes.set(xlabel="train images", ylabel="rsum")
    shown = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main()
