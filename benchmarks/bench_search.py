"""How good, how fast and how large is each type of index over a million vectors, beside what autofaiss picks?

    python benchmarks/bench_search.py --run RUN [--rows 1000000] [--peer PYTHON] [--out FILE.json]

The vectors are a run's image embeddings, drawn with replacement and jittered (independent noise would have no
structure to index), the queries are captions that the heads did not train on, so of the other modality. Every type
is built by ``retrieval.index.update``, as the command line does, in a process of its own, and searched in another
one. ``--peer`` names a Python that has autofaiss installed (its numpy is an older one); it gets the same vectors,
queries and budgets.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

BATCH, SINGLES, K = 64, 200, 10
PEER = """
import json, sys, time
from pathlib import Path
import numpy as np
task, folder, budget = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
import faiss
place, infos = str(folder / f"peer-{budget}.index"), str(folder / f"peer-{budget}.json")
if task == "build":
    from autofaiss import build_index
    start = time.perf_counter()
    build_index(np.load(folder / "vectors.npy"), index_path=place, index_infos_path=infos, metric_type="ip",
                max_index_memory_usage=budget, current_memory_available="16GB", max_index_query_time_ms=10.0)
    print(json.dumps({"build_seconds": time.perf_counter() - start}))
else:
    def peak():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    before = peak()
    about = json.loads(Path(infos).read_text())
    index = faiss.read_index(place, faiss.IO_FLAG_MMAP)
    faiss.ParameterSpace().set_index_parameters(index, about["index_param"])
    queries, exact = np.load(folder / "queries.npy"), np.load(folder / "exact.npy")
    found = index.search(queries, 10)[1]
    recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist())]))
    start = time.perf_counter()
    for query in queries[:200]:
        index.search(query[None], 10)
    single = 200 / (time.perf_counter() - start)
    start = time.perf_counter()
    for first in range(0, len(queries), 64):
        index.search(queries[first:first + 64], 10)
    batch = len(queries) / (time.perf_counter() - start)
    print(json.dumps({"picked": about["index_key"], "settings": about["index_param"], "recall@10": recall,
        "queries_per_second": single, "queries_per_second_batch": batch, "bytes": Path(place).stat().st_size,
        "memory": peak() - before}))
"""


def main() -> None:
    """Parses the options, makes the vectors, and measures one type after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--jitter", type=float, default=0.5, help="length of the noise; the vectors have length 1")
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--types", default="flat,hnsw,ivf,ivfpq")
    parser.add_argument("--min-recall", type=float, default=0.95)
    parser.add_argument("--peer", help="a Python that has autofaiss")
    parser.add_argument("--budgets", default="4GB,512MB", help="memory that autofaiss may use")
    parser.add_argument("--peer-limit", type=float, default=1800, help="seconds after which a peer's build is given up")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, folder, kind = options.task
        print(json.dumps({"build": build, "search": search}[task](Path(folder), kind, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {"machine": machine(), **make(Path(folder), options), "indexes": {}}
        for kind in options.types.split(","):
            result["indexes"][kind] = measured(own_command(kind, folder, options), options)
        for budget in options.budgets.split(",") if options.peer else ():
            command = lambda task, budget=budget: [options.peer, "-c", PEER, task, folder, budget]  # noqa: E731
            result["indexes"][f"autofaiss {budget}"] = measured(command, options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def own_command(kind: str, folder: str, options):
    """The command line of one of our own tasks."""
    shared = ["--run", str(options.run), "--min-recall", str(options.min_recall)]
    return lambda task: [sys.executable, __file__, *shared, "--task", task, folder, kind]


def measured(command, options) -> dict:
    """What building and searching print, each in a process of its own."""
    result = {}
    for task in ("build", "search"):
        try:
            done = subprocess.run(command(task), stdout=subprocess.PIPE, text=True, timeout=options.peer_limit)
        except subprocess.TimeoutExpired:
            return result | {"given_up_after_seconds": options.peer_limit}
        if done.returncode:
            return result | {"failed": task}
        result |= json.loads(done.stdout.splitlines()[-1])
    print(command("")[-1], result, file=sys.stderr)
    return result


def make(folder: Path, options) -> dict:
    """Writes vectors, queries and the exact answers."""
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.exact import exact_search

    embeddings = read_embeddings(options.run / "embeddings.h5")
    generator = np.random.default_rng(0)
    _, captions, _ = embeddings.split(embeddings.report_split)
    queries = embeddings.texts[generator.permutation(captions)[: options.queries]]
    dim = queries.shape[1]
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (options.rows, dim))
    for start in range(0, options.rows, 65536):
        block = embeddings.images[generator.integers(len(embeddings.images), size=min(65536, options.rows - start))]
        noise = generator.standard_normal(block.shape, dtype=np.float32)
        block = block + options.jitter * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        vectors[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    vectors.flush()
    np.save(folder / "queries.npy", queries)
    np.save(folder / "exact.npy", exact_search(vectors, queries, K)[1])
    return {"rows": options.rows, "dim": dim, "jitter": options.jitter, "queries": len(queries)}


def build(folder: Path, kind: str, options) -> dict:
    """Builds an index as the command line does."""
    from onceover.retrieval.gallery import Gallery
    from onceover.retrieval.index import update

    vectors, queries = np.load(folder / "vectors.npy"), np.load(folder / "queries.npy")
    names = [f"{row:07d}" for row in range(len(vectors))]
    gallery = Gallery("image", vectors, False, names, names, [[] for _ in names], names, None, "bench")
    common = {"source": "bench", "run": "", "memory": 2**40, "min_recall": options.min_recall}
    before, start = peak_memory(), time.perf_counter()
    done = update(folder / kind, gallery, queries[::2], kind=kind, **common)
    seconds = time.perf_counter() - start
    effort = done.manifest["segments"][0]["effort"]
    return {"build_seconds": seconds, "build_memory": peak_memory() - before, "settings": f"effort {effort}"}


def search(folder: Path, kind: str, options) -> dict:
    """Opens an index and searches it, one by one and in batches."""
    from onceover.retrieval.index import Index

    queries, exact = np.load(folder / "queries.npy"), np.load(folder / "exact.npy")
    before, start = peak_memory(), time.perf_counter()
    index = Index(folder / kind)
    opening = time.perf_counter() - start
    found = [rows for _, rows in index.search(queries[1::2], K)]  # the others chose the effort
    pairs = zip(found, exact[1::2].tolist(), strict=True)
    recall = np.mean([len(set(ours.tolist()) & set(truth)) / K for ours, truth in pairs])
    index.search(queries, K)  # what was mapped is in memory now, as it is for the peer
    start = time.perf_counter()
    for query in queries[:SINGLES]:
        index.search(query[None], K)
    single = SINGLES / (time.perf_counter() - start)
    start = time.perf_counter()
    for first in range(0, len(queries), BATCH):
        index.search(queries[first : first + BATCH], K)
    batch = len(queries) / (time.perf_counter() - start)
    return {
        "recall@10": float(recall),
        "queries_per_second": single,
        "queries_per_second_batch": batch,
        "bytes": sum(file.stat().st_size for file in (folder / kind).glob("*.faiss")),
        "bytes_with_rows": sum(file.stat().st_size for file in (folder / kind).iterdir()),
        "memory": peak_memory() - before,
        "open_seconds": opening,
    }


def peak_memory() -> int:
    """Bytes this process has held at most, mapped files that it touched included."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def machine() -> dict:
    """Where and with what this ran."""
    import os

    libraries = {name: version(name) for name in ("numpy", "faiss-cpu")}
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), **libraries}


if __name__ == "__main__":
    main()
