"""Builds an index of very many images whose lists lie on the disk, and measures its recall, speed, bytes and memory.

The vectors are a run's image embeddings, reduced to fewer dimensions by PCA, each many times with noise. They are made
again from their numbers whenever they are read, and no file ever holds them. Names, paths, contents and captions are
made up. Queries are the run's captions. The process is refused more than --memory of writable memory (Linux).

    OMP_NUM_THREADS=1 python benchmarks/bench_index.py --run runs/first --folder big --rows 10000000
"""

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from bench_folders import caption, content, image_name

from onceover.base.formats import EMBEDDINGS
from onceover.base.texts import Texts
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.gallery import Items
from onceover.retrieval.index import Index, update
from onceover.retrieval.index.faiss_files import RowFilter, open_faiss, search_blocks, search_parameters
from onceover.retrieval.index.types import EFFORTS

BLOCK = 16_384  # vectors made at a time
NOISE = 0.5  # length of the noise, of vectors of length 1
QUERIES = 500
K = 10


def unit(vectors):
    """The vectors, scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Jittered:
    """Vectors that are made when they are read: row i is a row of ``base`` with noise; float32 (rows, D)."""

    def __init__(self, base, rows):
        self._base = base
        self.shape = (rows, base.shape[1])

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        for block in self.blocks():
            yield from block

    def __getitem__(self, wanted):
        """A slice of the rows, or those of some ascending numbers."""
        if isinstance(wanted, slice):
            start, stop, _ = wanted.indices(len(self))
            wanted = np.arange(start, stop)
        chosen = []
        blocks = wanted // BLOCK
        for block in np.unique(blocks):
            chosen.append(self.block(int(block))[wanted[blocks == block] - block * BLOCK])
        return np.concatenate(chosen)

    def block(self, number):
        """The rows of a block, by its number."""
        generator = np.random.default_rng(number)
        count = min(BLOCK, len(self) - number * BLOCK)
        rows = generator.integers(len(self._base), size=count)
        noise = generator.standard_normal((count, self.shape[1]), dtype=np.float32)
        return unit(self._base[rows] + NOISE / self.shape[1] ** 0.5 * noise)

    def blocks(self):
        """All rows, block by block."""
        for number in range(-(-len(self) // BLOCK)):
            yield self.block(number)


def reduced(images, texts, dim):
    """Both, on the first ``dim`` principal axes of the images, as unit vectors."""
    centre = images.mean(axis=0)
    axes = np.linalg.svd(images - centre, full_matrices=False)[2][:dim].T
    return unit(images @ axes), unit(texts @ axes)


def status(name):
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(path, kind, vectors, queries, truth):
    """The recall@10 and the queries a second, one by one, for each effort."""
    index = open_faiss(path, kind, *vectors.shape)
    everything = RowFilter(np.ones(len(vectors), bool))
    rows = []
    for effort in EFFORTS[kind]:
        parameters = search_parameters(kind, effort, everything)
        start = time.perf_counter()
        found = [index.search(query[None], K, params=parameters)[1][0] for query in queries]
        seconds = time.perf_counter() - start
        recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth, strict=True)]))
        speed = round(len(queries) / seconds, 1)
        rows.append({"cells": effort, "recall@10": round(recall, 4), "queries_per_second": speed})
        print(json.dumps(rows[-1]), flush=True)
        if recall > 0.995:
            break
    return rows


def main():
    """Builds, searches, prints a line of JSON after each step, and removes what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--folder", required=True, type=Path, help="a new folder for the index; removed at the end")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--kind", default="ivf16")
    parser.add_argument("--memory", type=float, default=4, help="GiB")
    arguments = parser.parse_args()
    limit = int(arguments.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    embeddings = read_embeddings(arguments.run / EMBEDDINGS)
    some = np.random.default_rng(0).permutation(len(embeddings.texts))[:QUERIES]
    base, queries = reduced(np.array(embeddings.images), np.array(embeddings.texts[np.sort(some)]), arguments.dim)
    vectors = Jittered(base.astype(np.float32), arguments.rows)
    queries = np.ascontiguousarray(queries, np.float32)
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there; name a new folder")
    folder = arguments.folder / "index"  # beside it lies, for a while, what it is made of
    rows = range(arguments.rows)
    result = {"rows": len(vectors), "dim": arguments.dim, "type": arguments.kind}
    items = Items(
        ids=Texts(map(image_name, rows)),
        paths=Texts(f"photos/{image_name(row)}" for row in rows),
        sha256=Texts(map(content, rows)),
        captions=Texts(map(caption, rows)),
        image_index=np.arange(arguments.rows),
        thumbnails=None,
    )
    try:
        start = time.perf_counter()
        cpu = time.process_time()
        gallery = items.gallery("image", vectors, None, "made up")
        update(folder, gallery, queries, source="made up", run="made up", kind=arguments.kind, memory=limit)
        result["seconds"] = round(time.perf_counter() - start, 1)
        result["CPU_seconds"] = round(time.process_time() - cpu, 1)
        result["bytes"] = {path.suffix: path.stat().st_size for path in folder.iterdir()}
        result["peak_mapped_and_own_MiB"] = round(status("VmHWM"))
        result["own_MiB"] = round(status("RssAnon"))
        print(json.dumps(result), flush=True)
        start = time.perf_counter()
        truth = search_blocks(queries, vectors.blocks(), K)[1]
        result["exact_seconds"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        Index(folder)
        result["open_seconds"] = round(time.perf_counter() - start, 1)
        path = next(folder.glob("*.faiss"))
        result["search"] = measure(path, arguments.kind, vectors, queries, truth)
        result["own_MiB_after_search"] = round(status("RssAnon"))
        print(json.dumps(result), flush=True)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
