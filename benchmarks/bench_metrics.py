"""What do the metrics of one model cost, beside the bare product of its two matrices of embeddings?

    python benchmarks/bench_metrics.py --run RUN [--out FILE.json]

Side by side in one process, medians of several rounds: the bare float32 similarity matrix; that and a count without
sorting (how many scores of each row, and of each column, exceed the correct one's); ``retrieval.ranks.rank``, which
gives exact ranks of both directions; and ``report`` without and with 1,000 bootstrap draws. With ``--flickr30k``, time
and memory of ``rank`` on made-up embeddings of that dataset's size (31,014 images, 155,070 captions, 512 dimensions).
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.metrics import report
from onceover.retrieval.ranks import rank


def main() -> None:
    """Parses the options and prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flickr30k", action="store_true")
    parser.add_argument("--noise", type=float, default=8.0, help="of made-up captions, beside their image's length 1")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"machine": machine(), **costs(options)}
    if options.flickr30k:
        result["flickr30k"] = large(options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def costs(options) -> dict:
    """Milliseconds of each task, medians over interleaved rounds, and the two ratios that matter."""
    embeddings = read_embeddings(options.run / "embeddings.h5")
    pictures, captions, index = embeddings.split(embeddings.report_split)
    images, texts = embeddings.images[pictures], embeddings.texts[captions]
    ranks = rank(images, texts, index)
    tasks = {
        "product": lambda: images @ texts.T,
        "product_and_count": lambda: count(images, texts, index),
        "rank": lambda: rank(images, texts, index),
        "report": lambda: report([ranks], draws=0),
        "report_1000_draws": lambda: report([ranks], draws=1000),
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(options.rounds + 2):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn >= 2:  # two rounds to warm up
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    metrics = medians["rank"] + medians["report"]
    return {
        "pictures": len(images),
        "captions": len(texts),
        "dim": images.shape[1],
        "milliseconds": {name: round(value, 2) for name, value in medians.items()},
        "metrics / product": round(metrics / medians["product"], 2),
        "metrics / product and count": round(metrics / medians["product_and_count"], 2),
        "1,000 draws / metrics": round((medians["report_1000_draws"] - medians["report"]) / metrics, 2),
    }


def count(images: np.ndarray, texts: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bare product, and how many scores exceed each correct one in its row and in its column, ties ignored."""
    scores = images @ texts.T
    own = scores[index, np.arange(len(texts))]
    best = np.full(len(images), -np.inf, np.float32)
    np.maximum.at(best, index, own)
    return np.count_nonzero(scores > best[:, None], axis=1), np.count_nonzero(scores > own, axis=0)


def large(options) -> dict:
    """Time and peak memory of ``rank`` at Flickr30k's size."""
    generator = np.random.default_rng(0)
    images, noise = (generator.standard_normal((rows, 512), dtype=np.float32) for rows in (31_014, 155_070))
    index = np.repeat(np.arange(len(images)), 5)
    texts = images[index] + options.noise * noise
    del noise
    for rows in (images, texts):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    start = time.perf_counter()
    found = rank(images, texts, index)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for first in range(0, len(images), 256):
        images[first : first + 256] @ texts.T
    product = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
    return {
        "seconds": round(seconds, 1),
        "rank / product": round(seconds / product, 2),
        "peak_memory_GiB": round(peak, 2),
        "text_to_image R@1": round(100 * found[1].hit_at(1).mean(), 1),
        "embeddings_GiB": round((images.nbytes + texts.nbytes) / 2**30, 2),
    }


def machine() -> dict:
    """Where and with what this ran."""
    return {"processor": platform.machine(), "cores": os.cpu_count(), "numpy": version("numpy")}


if __name__ == "__main__":
    main()
