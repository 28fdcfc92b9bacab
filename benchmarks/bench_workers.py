"""Do workers of an extraction lose or double anything when they are killed, and what does a cluster of Ray cost?

    python benchmarks/bench_workers.py kills [--repetitions 10] [--workers 3] [--seed 0]
    python benchmarks/bench_workers.py ray --data ../shared/flickr8k [--images 400] [--rounds 3]

``kills``: workers of one store (``--worker I/N``) run at once over drawn images, with tiny encoders; each is killed
(SIGKILL) at random moments and started again until it is done. Their store must be that of a single process, byte for
byte, and no shard may be written twice.

``ray``: the rate of ``--engine ray`` beside that of the local engine with the same cores, from the first finished rows
on, so that the start of the cluster and of its actors is left out; then an actor is killed in the middle, and the
store is compared. The encoders are ResNet50 and DistilBERT with random weights.

Prints the results as JSON.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

from onceover.configs.schema import ExtractConfig
from onceover.extract.engines import ENGINES
from onceover.extract.layouts import read_dataset
from onceover.extract.pipeline import extract
from onceover.extract.store import FeatureStore, parts_folder
from onceover.extract.synthetic import draw_dataset

IMAGES = (144, 24, 24)  # drawn: train, dev, test
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kills(options, Path(folder)) if options.what == "kills" else ray(options, Path(folder))
    print(json.dumps(result, indent=2))


def kills(options: argparse.Namespace, folder: Path) -> dict:
    """Has workers killed until they are done, again and again, and compares their stores with one that is whole."""
    data = folder / "data"
    draw_dataset(data, *IMAGES)
    (data / "images/0005.jpg").write_bytes(b"no image")
    config = tiny_encoders(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
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
            if process.exitcode == 0:
                del running[number]
            elif process.exitcode is not None or time.monotonic() > deadline:
                os.kill(process.pid, signal.SIGKILL) if process.exitcode is None else None
                process.join()
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
    return process, time.monotonic() + generator.uniform(0, 2.5 * seconds)


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


def ray(options: argparse.Namespace, folder: Path) -> dict:
    """Compares rates and stores of Ray and the local engine, and kills an actor of Ray in the middle."""
    dataset = read_dataset(options.data).first(options.images)
    config = ExtractConfig(
        image_encoder="torchvision:resnet50@random", text_encoder="hf:distilbert-base-uncased@random", dtype="float32"
    )
    rates: dict[str, list[dict[str, float]]] = {"threads": [], "ray": []}
    for number in range(options.rounds):
        for engine, of_engine in rates.items():
            of_engine.append(timed_rates(dataset, folder / f"{engine}-{number}.h5", config, engine))
    expected = contents(folder / "threads-0.h5")
    assert contents(folder / "ray-0.h5") == expected, "Ray made another store"
    store = folder / "killed.h5"
    killer = threading.Thread(target=kill_an_actor, args=(store, 5))
    killer.start()
    extract(dataset, store, dataclasses.replace(config, batch_size=None), device="cpu", engine="ray")
    killer.join()
    assert contents(store) == expected, "with an actor killed, Ray made another store"
    medians = {}
    for engine, of_engine in rates.items():
        for kind in ("image", "text"):
            medians[f"{engine}, {kind} rows/s"] = statistics.median(rate[kind] for rate in of_engine)
    costs = {}
    for kind in ("image", "text"):
        costs[kind] = 1 - medians[f"ray, {kind} rows/s"] / medians[f"threads, {kind} rows/s"]
    return {"images": options.images, "medians": medians, "Ray is slower by": costs, "a killed actor": "equal store"}


def timed_rates(dataset, store: Path, config: ExtractConfig, name: str) -> dict[str, float]:
    """Rows a second by kind from the first finished rows on, of an extraction by an engine."""
    engine = ENGINES.load(name)
    run = engine.run
    rates = {}

    def timed(encoding, todo, device):
        times = []
        rows = []
        for progress in run(encoding, todo, device):
            if progress.rows:
                times.append(time.perf_counter())
                rows.append(progress.rows)
            yield progress
        rates[encoding.kind] = sum(rows[1:]) / (times[-1] - times[0])

    engine.run = timed
    try:
        extract(dataset, store, config, device="cpu", engine=name)
    finally:
        engine.run = run
    return rates


def kill_an_actor(store: Path, after: int) -> None:
    """Kills one of Ray's actors once so many shards are there."""
    while len(shards(store)) < after:
        time.sleep(0.05)
    for process in Path("/proc").glob("[0-9]*"):
        if b"ray::_Actor" in (process / "cmdline").read_bytes():
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError("no actor was found")


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
