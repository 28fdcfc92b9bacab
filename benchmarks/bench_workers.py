"""Do workers of an extraction lose or double anything when they are killed, and what does a cluster of Ray cost?

    python benchmarks/bench_workers.py kills [--repetitions 10] [--workers 3] [--seed 0]
    python benchmarks/bench_workers.py ray --data flickr8k [--images 400] [--rounds 3] [--image-encoder SPEC]

``kills``: workers of one store (``--worker I/N``) run at once over drawn images, with tiny encoders; each is killed
(SIGKILL) at random moments and started again until it is done. Their store must be that of a single process, byte for
byte, and no shard may be written twice.

``ray``: the time of ``--engine ray`` on a cluster of two nodes with a core each beside that of the local engine with
two threads, from the first tenth of the rows on, so that the start of the cluster and of its workers is left out; then
a worker is killed and a node is lost in the middle, and the stores are compared. On a machine that does other work go
by the processor time.

Prints the results as JSON.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from onceover.configs.schema import ExtractConfig
from onceover.extract.engines import ENGINES
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore, parts_folder
from onceover.extract.synthetic import draw_dataset

IMAGES = (36, 12, 12)  # drawn: train, dev, test
NODES = 2  # of the cluster, with a core each
PRELOADED = ["onceover.extract.share", "onceover.extract.encoding.image", "onceover.extract.encoding.text"]


def main() -> None:
    """Parses the options and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "ray"])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--views", type=int, default=ExtractConfig.views)
    parser.add_argument("--image-encoder", default="torchvision:resnet50@random")
    parser.add_argument("--text-encoder", default="hf:distilbert-base-uncased@random")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kills(options, Path(folder)) if options.what == "kills" else on_ray(options, Path(folder))
    print(json.dumps(result, indent=2))


def kills(options: argparse.Namespace, folder: Path) -> dict:
    """Has workers killed until they are done, again and again, and compares their stores with one that is whole."""
    data = folder / "data"
    draw_dataset(data, *IMAGES)
    (data / "images/0005.jpg").write_bytes(b"no image")
    config = tiny_encoders(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    first = context.Process(target=int)  # starts the server, which imports the libraries
    first.start()
    first.join()
    start = time.monotonic()
    alone = context.Process(target=work, args=(data, folder / "alone.h5", config, None))
    alone.start()
    alone.join()
    seconds = time.monotonic() - start
    expected = contents(folder / "alone.h5")
    generator = random.Random(options.seed)
    counts = []
    for number in range(options.repetitions):
        store = folder / f"{number}.h5"
        count = killed_until_done(context, data, store, config, options.workers, generator, seconds)
        last = context.Process(target=work, args=(data, store, config, None))
        last.start()
        last.join()
        assert last.exitcode == 0, "the last call failed"
        assert contents(store) == expected, f"repetition {number} made another store"
        assert not parts_folder(store).exists(), "shards are left"
        counts.append(count)
        print(f"repetition {number + 1}: {count} kills, equal store", file=sys.stderr)
    return {"repetitions": options.repetitions, "workers": options.workers, "kills": counts, "stores": "equal"}


def killed_until_done(context, data, store, config, workers, generator, seconds) -> int:
    """Runs all workers at once, and kills and restarts each until it has ended by itself; gives the number of kills."""
    running = {}
    kill_count = 0
    written: dict[str, tuple[int, int]] = {}
    for number in range(1, workers + 1):
        running[number] = started(context, data, store, config, f"{number}/{workers}", generator, seconds)
    while running:
        time.sleep(0.005)
        for number, (process, deadline) in list(running.items()):
            if process.exitcode is None and time.monotonic() > deadline:
                process.kill()
                process.join()
            if process.exitcode == 0:  # it may just have ended when it was to be killed
                del running[number]
            elif process.exitcode is not None:
                assert process.exitcode == -signal.SIGKILL, f"a worker failed: {process.exitcode}"
                kill_count += 1
                there = shards(store)
                assert written.items() <= there.items(), "a shard was written again, or was lost"
                written = there
                running[number] = started(context, data, store, config, f"{number}/{workers}", generator, seconds)
    assert written.items() <= shards(store).items(), "a shard was written again, or was lost"
    return kill_count


def started(context, data, store, config, worker, generator, seconds) -> tuple:
    """A worker that was started, and the moment when it is to be killed."""
    process = context.Process(target=work, args=(data, store, config, worker))
    process.start()
    return process, time.monotonic() + generator.uniform(0, 3 * seconds)


def work(data: Path, store: Path, config: ExtractConfig, worker: str | None) -> None:
    """Runs a worker, or the extraction that seals the store."""
    import torch

    from onceover.base.worker import parse_worker
    from onceover.extract.share import extract_share

    torch.set_num_threads(1)
    if worker is None:
        extract(read_dataset(data), store, config, device="cpu")
    else:
        extract_share(read_dataset(data), store, config, parse_worker(worker), device="cpu")


def tiny_encoders(folder: Path) -> ExtractConfig:
    """Settings with two encoders of random weights that take next to no time."""
    import torch
    from transformers import BertConfig, BertModel, BitImageProcessor, ResNetConfig, ResNetModel

    from onceover.extract.encoding.vocabulary import dataset_tokenizer

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder / "resnet")
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "resnet")
    tokenizer = dataset_tokenizer(read_dataset(folder / "data").captions)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **small)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return ExtractConfig(
        image_encoder=f"hf:{folder / 'resnet'}", text_encoder=f"hf:{folder / 'bert'}", batch_size=8, dtype="float32"
    )


def on_ray(options: argparse.Namespace, folder: Path) -> dict:
    """Compares rates and stores of Ray and the local engine, and takes a worker and a node away in the middle."""
    import torch
    from ray.cluster_utils import Cluster

    from onceover.extract.engines.ray import connect

    torch.set_num_threads(NODES)
    dataset = read_dataset(options.data).first(options.images)
    config = ExtractConfig(
        image_encoder=options.image_encoder,
        text_encoder=options.text_encoder,
        views=options.views,
        batch_size=16,
        dtype="float32",
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=1)
    connect(cluster.address)
    costs: dict[str, dict[str, list[Cost]]] = {}
    for number in range(options.rounds):
        for engine in ("threads", "ray"):
            of_engine = measured(dataset, folder / f"{engine}-{number}.h5", config, engine)
            for kind, cost in of_engine.items():
                costs.setdefault(kind, {}).setdefault(engine, []).append(cost)
    expected = contents(folder / "threads-0.h5")
    result: dict = {"images": options.images, "load": os.getloadavg()[1]}
    for kind, of_kind in costs.items():
        for unit in Cost._fields:
            medians = {}
            for engine, of_engine in of_kind.items():
                medians[engine] = statistics.median(getattr(cost, unit) for cost in of_engine)
            result[f"{kind}, ms a row, {unit}"] = medians | {"Ray, more": medians["ray"] / medians["threads"] - 1}
    assert contents(folder / "ray-0.h5") == expected, "Ray made another store"
    result["store"] = "equal"
    for event, act in (("killed worker", kill_one), ("lost node", lambda _: lose_node(cluster))):
        store = folder / f"{event}.h5"
        (folder / event).mkdir()
        disturbed(dataset, store, config, folder / event, act)
        assert contents(store) == expected, f"{event}: Ray made another store"
        result[event] = "equal store, no shard written twice"
    return result


class Cost(NamedTuple):
    """Milliseconds a row, by the clock and of processor time in all processes, when a tenth is done and later."""

    clock: float
    processors: float


def measured(dataset, store: Path, config: ExtractConfig, name: str) -> dict[str, Cost]:
    """The cost of an extraction by an engine, by kind."""
    engine = ENGINES.load(name)
    run = engine.run
    costs = {}

    def timed(encoding, todo, device):
        total = sum(shard.size for shard in todo)
        done = 0
        start = None
        for progress in run(encoding, todo, device):
            done += progress.rows
            if start is None and done >= total / 10:
                start = (done, time.perf_counter(), processor_seconds())
            yield progress
            if done == total and encoding.kind not in costs:
                rows = done - start[0]
                clock = time.perf_counter() - start[1]
                costs[encoding.kind] = Cost(1e3 * clock / rows, 1e3 * (processor_seconds() - start[2]) / rows)

    engine.run = timed
    try:
        extract(dataset, store, config, device="cpu", engine=name, backend="eager")
    finally:
        engine.run = run
    return costs


def processor_seconds() -> float:
    """Of this process and all that it has started, those that have ended among them."""
    ticks = {}
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        ticks[int(stat.parent.name)] = sum(map(int, fields[11:15]))
    total = 0
    for process, count in ticks.items():
        ancestor = process
        while ancestor not in (os.getpid(), 0, 1) and ancestor in parents:
            ancestor = parents[ancestor]
        total += count if ancestor == os.getpid() else 0
    return total / os.sysconf("SC_CLK_TCK")


def disturbed(dataset, store: Path, config: ExtractConfig, notes: Path, act: Callable[[Path], object]) -> None:
    """Extracts on Ray; when a third of the images is encoded something is taken away."""
    engine = ENGINES.load("ray")
    run = engine.run
    written: dict[str, tuple[int, int]] = {}

    def watched(encoding, todo, device):
        encoding._load = partial(noting, encoding._load, notes)
        for number, progress in enumerate(run(encoding, todo, device)):
            if encoding.kind == "image" and number == len(todo) // 3:
                act(notes)
            there = shards(store)
            assert written.items() <= there.items(), "a shard was written again, or was lost"
            written.update(there)
            yield progress

    engine.run = watched
    try:
        extract(dataset, store, config, device="cpu", engine="ray", backend="eager")
    finally:
        engine.run = run


def noting(load: Callable, notes: Path, **options) -> object:
    """Loads an encoder, and notes which process has it."""
    (notes / str(os.getpid())).touch()
    return load(**options)


def kill_one(notes: Path) -> None:
    """Kills one of the processes that were noted."""
    os.kill(int(min(notes.iterdir()).name), signal.SIGKILL)


def lose_node(cluster) -> None:
    """Takes a node away, as a power failure would."""
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


def shards(store: Path) -> dict[str, tuple[int, int]]:
    """The shards of an unfinished store by name: the file, and when it was written."""
    found = {}
    for file in parts_folder(store).glob("[it]*.h5"):
        status = file.stat()
        found[file.name] = (status.st_ino, status.st_mtime_ns)
    return found


def contents(path: Path) -> dict:
    """All that a store holds but for what says how and when it was made."""
    with FeatureStore(path) as store:
        assert store.verify() == []
        return {
            "images": store.image_features[:].tobytes(),
            "texts": store.text_features[:].tobytes(),
            "ids": store.image_ids,
            "captions": store.captions,
            "captions' images": store.image_index.tolist(),
            "failures": store.failures,
        }


if __name__ == "__main__":
    main()
