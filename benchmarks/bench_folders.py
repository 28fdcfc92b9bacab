"""Stores that are folders: do planning, sealing and opening grow with the shards, and how fast is a very large one?

    python benchmarks/bench_folders.py growth [--images 8192] [--folder DIR] [--out FILE.json]
    python benchmarks/bench_folders.py million [--images 1000000] [--folder DIR] [--out FILE.json]
    python benchmarks/bench_folders.py fit [--images 160000] [--folder DIR] [--out FILE.json]
    python benchmarks/bench_folders.py remote [--images 110000] [--folder DIR] [--out FILE.json]

``growth``: shards of made-up features as an extraction writes them, and 4 and 16 times as many; each step runs in a
process of its own. Told are its seconds of processor time, the memory that it takes at most beside what Python had
before (``MiB``), and how much of that is its own, without the pages of files that the system may take back
(``own_MiB``); of sealing also the bytes that each image with its caption adds, from the smallest size to the largest.

``million``: so many images and captions in Parquet files, with features of few numbers that are made up; then
``info``, ``verify`` and an ``extract`` that finds nothing to do, as commands.

``fit``: made-up features of the default encoders, 19 KiB an image; how fast the disk reads their files, how fast a
fit's shuffled chunks are read from them, both with nothing in the system's cache, and a fit of one epoch with
``--memory 2GiB`` while the system refuses more than 2 GiB of anonymous memory.

``remote``: the same features at an address, of an object store that moto serves from a process of its own on this
machine; how fast its files are fetched and no more, how fast the chunks are read with an empty cache and with a full
one, and the same fit.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

BUCKET = "s3://stores"
ROOT = Path(__file__).resolve().parents[1]
TIMES = (1, 4, 16)
DIMS = {"image": (1, 512), "text": (384,)}  # of the features whose growth is measured
ROWS = {"image": 128, "text": 512}  # of a shard: 8 batches on a processor
LARGE = {"image": 1024, "text": 4096}  # of a shard: 8 batches on a GPU
RECIPE = {"weights": "0" * 64, "pooling": "mean", "layers": ["last"], "dtype": "float32", "store_dtype": "float32"}


def main() -> None:
    """Parses the options and prints the result as JSON; or does one step and prints its own numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["growth", "million", "fit", "remote", *STEPS])
    parser.add_argument("--images", type=int)
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what in STEPS:
        print(json.dumps(measured_step(STEPS[options.what], options.folder, options.images)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure = {"growth": growth, "million": million, "fit": fit, "remote": remote}[options.what]
        result = {"machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}}
        result |= measure(Path(folder), options.images)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def growth(folder: Path, images: int | None) -> dict:
    """Seconds and memory of each step at each size."""
    result: dict = {}
    for times in TIMES:
        count = times * (images or 8192)
        own = folder / str(times)
        write_shards(own / "s.store.parts", count, DIMS, ROWS)
        shards = sum(-(-count // rows) for rows in ROWS.values())
        result[f"{times}x"] = {"images": count, "captions": count, "shards": shards}
        for step in ("plan", "seal", "open", "read"):
            result[f"{times}x"][step] = run_step(step, own, count)
        print(f"{times}x: {result[f'{times}x']}", file=sys.stderr, flush=True)
    smallest, *_, largest = (result[f"{times}x"] for times in TIMES)
    added = (largest["seal"]["own_MiB"] - smallest["seal"]["own_MiB"]) * 2**20
    result["seal_bytes_an_image"] = round(added / (largest["images"] - smallest["images"]))
    return result


def run_step(step: str, folder: Path, images: int) -> dict:
    """A step in a process of its own."""
    command = [sys.executable, __file__, step, "--folder", str(folder), "--images", str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured_step(step, folder: Path, images: int) -> dict:
    """The seconds of a step, and by how much it raised the process's peaks of memory."""
    import onceover.extract.sealing  # noqa: F401 - what all steps need is loaded beforehand

    before = status("VmHWM")
    own_before = status("RssAnon")
    own_peak = own_before
    is_done = threading.Event()

    def watch() -> None:
        nonlocal own_peak
        while not is_done.wait(0.02):
            own_peak = max(own_peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    step(folder, images)
    seconds = time.process_time() - start
    is_done.set()
    watcher.join()
    own = max(own_peak, status("RssAnon")) - own_before
    return {"CPU_s": round(seconds, 3), "MiB": round(status("VmHWM") - before, 1), "own_MiB": round(own, 1)}


def status(name: str) -> float:
    """A number of MiB that the system tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def plan(folder: Path, images: int) -> None:
    """Plans the shards of a new extraction."""
    from onceover.extract.plan import plan_shards, shards_of

    for kind in DIMS:
        shards_of(plan_shards(kind, np.arange(images), 16, 4), kind, folder)


def seal_folder(folder: Path, images: int) -> None:
    """Seals the shards that are there as a folder."""
    seal_synthetic(folder / "s.store", images, {})


def open_folder(folder: Path, images: int) -> None:
    """Opens the folder and reads the features of one image."""
    from onceover.extract.store import FeatureStore

    with FeatureStore(folder / "s.store") as store:
        assert store.image_features[images // 2].shape == DIMS["image"]


def read_folder(folder: Path, images: int) -> None:
    """Reads all features once, in order."""
    from onceover.extract.store import KINDS, FeatureStore, row_blocks

    with FeatureStore(folder / "s.store") as store:
        for kind in KINDS:
            for rows in row_blocks(images):
                assert store.features(kind)[rows].any()


STEPS = {"plan": plan, "seal": seal_folder, "open": open_folder, "read": read_folder}


def image_name(row: int) -> str:
    """The name of an image."""
    return f"{row:07d}.jpg"


def content(row: int) -> str:
    """What stands for the SHA-256 of an image."""
    return f"{row:064x}"


def caption(row: int) -> str:
    """The caption of an image."""
    return f"image {row} shows what image {row} shows"


def write_shards(parts: Path, images: int, dims: dict, rows_of: dict, names=image_name, stats=None) -> None:
    """Writes the shards of so many images, with a caption each, as an extraction does."""
    from onceover.extract.shards import write_shard

    parts.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for kind, rows in rows_of.items():
        for number, start in enumerate(range(0, images, rows)):
            numbers = range(start, min(start + rows, images))
            features = generator.standard_normal((len(numbers), *dims[kind]), np.float32)
            columns = {"caption": [caption(row) for row in numbers], "truncated": np.zeros(len(numbers), bool)}
            columns |= {name: np.full(len(numbers), 8, np.int32) for name in ("unknown", "tokens")}
            if kind == "image":
                columns = {"id": [names(row) for row in numbers], "sha256": [content(row) for row in numbers]}
                sizes = [stats[row] if stats else (0, 0) for row in numbers]
                columns["size"] = np.array([size for size, _ in sizes], np.int64)
                columns["mtime_ns"] = np.array([mtime for _, mtime in sizes], np.int64)
            write_shard(parts / f"{kind}-{0:012x}-{number:05d}.h5", kind, columns | {"features": features}, RECIPE, [])


def seal_synthetic(path: Path, images: int, provenance: dict, splits=None, names=image_name, paths=None, stats=None):
    """Seals the shards of ``write_shards`` as a folder."""
    from onceover.base.files import digest
    from onceover.base.texts import ChosenTexts, Texts
    from onceover.extract.sealing import seal
    from onceover.extract.shards import RowSources, shard_files

    sources = {}
    for kind, columns in (("image", ()), ("text", ("truncated",))):
        sources[kind] = RowSources(kind, digest(RECIPE), columns)
        for shard in shard_files(Path(f"{path}.parts"), kind):
            sources[kind].add(shard)
    sources["image"].forget_stats()
    stats = np.zeros((images, 2), np.int64) if stats is None else np.array(stats)
    machine = {"encoder": "made up", "device": "cpu", "streams": 1, "batch_size": 16, "torch": "0", "transformers": "0"}
    seal(
        path,
        form="folder",
        images={
            "id": Texts(names(row) for row in range(images)),
            "path": paths or Texts(names(row) for row in range(images)),
            "split": splits or Texts("train" for _ in range(images)),
            "sha256": ChosenTexts(sources["image"].contents, np.arange(images)),
            "size": stats[:, 0],
            "mtime_ns": stats[:, 1],
        },
        texts={"caption": Texts(caption(row) for row in range(images)), "image_index": np.arange(images)},
        sources=sources,
        recipes={"image": RECIPE, "text": RECIPE},
        provenance={
            "data": "d",
            "layout": "l",
            "notes": [],
            "created": "now",
            "settings": {},
            "image": machine,
            "text": machine,
        }
        | provenance,
        failures=[],
        tokenizer_files={},
    )


def million(folder: Path, images: int | None) -> dict:
    """Seconds and peak memory of commands on a store of very many images.

    A process of its own makes the store, since the peak of a command is at least that of the one that starts it.
    """
    images = images or 1_000_000
    made = run_step("make", folder, images)
    store = folder / "s.store"
    result: dict = {"images": images, "captions": images, "shards": len(list(store.iterdir())) - 1}
    result |= {"manifest_MiB": round((store / "manifest.h5").stat().st_size / 2**20, 1), "made": made}
    extract = ["extract", "--data", folder / "data", "--store", store, "--config", "demo"]
    for command in (["info", store], ["verify", store], extract):
        result[command[0]] = run_command(command)
        print(command[0], result[command[0]], file=sys.stderr, flush=True)
    return result


def make_million(folder: Path, images: int) -> None:
    """Makes the dataset and the store of ``million``."""
    from onceover.configs.schema import DEFAULT_CONFIG, load_config
    from onceover.extract.dataset.reading import ReadOptions
    from onceover.extract.layouts import read_dataset
    from onceover.extract.pipeline import _listing, _request

    write_parquet(folder / "data", images)
    config = load_config(DEFAULT_CONFIG.with_name("demo.yaml")).extract
    dataset = read_dataset(folder / "data", config.seed, ReadOptions())
    stats = [dataset.images.stat(key) for key in dataset.paths]
    store = folder / "s.store"
    names = dataset.ids.__getitem__
    write_shards(Path(f"{store}.parts"), images, {"image": (1, 8), "text": (8,)}, LARGE, names, stats)
    made = {"listing": _listing(dataset, stats), "request": _request(config, dataset)} | dataset.provenance()
    seal_synthetic(store, images, made, dataset.splits, names, dataset.paths, stats)
    shutil.rmtree(f"{store}.parts")


STEPS["make"] = make_million


def fit(folder: Path, images: int | None) -> dict:
    """How fast a store that does not fit the memory is read, and a fit on it."""
    from bench_memory import LIMIT, fitted, measured

    images = images or 160_000
    store = folder / "s.store"
    make_wide(store, images)
    files = sorted(store.iterdir())
    result: dict = {"images": images, "GiB": round(sum(file.stat().st_size for file in files) / 2**30, 2)}
    forget(files)
    result["disk_MiB_s"] = rate(lambda: sum(read_whole(file) for file in files))
    forget(files)
    result["first_pass_MiB_s"] = rate(lambda: read_in_order(store))
    forget(files)
    result["chunks_MiB_s"] = rate(lambda: read_chunks(store))
    result["chunks_cached_MiB_s"] = rate(lambda: read_chunks(store))
    run = folder / "run"
    command = ["fit", "--store", store, "--run", run, "--memory", "2GiB", "--set", "training.num_epochs=1"]
    result["fit"] = measured([*command, "--device", "cpu"], LIMIT) | fitted(run)
    return result


def make_wide(store: Path, images: int) -> None:
    """A store with features as wide as the default encoders': 19 KiB an image with its caption."""
    write_shards(Path(f"{store}.parts"), images, {"image": (2, 2048), "text": (768,)}, ROWS)
    splits = ["dev" if row < 1000 else "test" if row < 2000 else "train" for row in range(images)]
    seal_synthetic(store, images, {}, splits)
    shutil.rmtree(f"{store}.parts")


def remote(folder: Path, images: int | None) -> dict:
    """How fast a store at an address is read, and a fit on it that its features leave no room for."""
    from bench_memory import LIMIT, fitted, measured

    from onceover.base import drivers

    images = images or 110_000
    store = folder / "s.store"
    make_wide(store, images)
    files = sorted(store.iterdir())
    size = sum(file.stat().st_size for file in files)
    result: dict = {"images": images, "GiB": round(size / 2**30, 2)}
    address = f"{BUCKET}/s.store"
    os.environ["ONCEOVER_CACHE"] = str(folder / "cache")
    with object_store(BUCKET):
        for file in files:
            drivers.upload(file, f"{address}/{file.name}")
            file.unlink()
        result["fetched_MiB_s"] = rate(lambda: sum(fetch(f"{address}/{file.name}", folder / "x") for file in files))
        result["chunks_MiB_s"] = rate(lambda: read_chunks(address))
        result["chunks_cached_MiB_s"] = rate(lambda: read_chunks(address))
        shutil.rmtree(folder / "cache")
        command = ["fit", "--store", address, "--run", folder / "run", "--memory", "2GiB", "--device", "cpu"]
        result["fit"] = measured([*command, "--set", "training.num_epochs=1"], LIMIT) | fitted(folder / "run")
    return result


@contextlib.contextmanager
def object_store(bucket: str):
    """An object store with an empty bucket, served by a process of its own; the environment names it to s3fs."""
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    s3fs.S3FileSystem().mkdir(bucket)
                    break
                time.sleep(0.2)
            yield
        finally:
            server.kill()


def fetch(address: str, target: Path) -> int:
    """Fetches a file and does no more; its bytes."""
    from onceover.base import drivers

    drivers.download(address, target)
    return target.stat().st_size


def forget(files: list[Path]) -> None:
    """Takes files out of the system's cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def rate(read) -> float:
    """MiB a second; ``read`` tells how many bytes it read."""
    start = time.perf_counter()
    size = read()
    return round(size / 2**20 / (time.perf_counter() - start), 1)


def read_whole(file: Path) -> int:
    """Reads a file in one go."""
    return len(file.read_bytes())


def read_in_order(store: Path) -> int:
    """Reads all features once, as the first pass of a fit does, which compares checksums; bytes of features."""
    from onceover.extract.store import KINDS, FeatureStore
    from onceover.heads.chunks import blocks

    with FeatureStore(store) as opened:
        return sum(block.nbytes for kind in KINDS for block in blocks(opened.features(kind)))


def read_chunks(store: Path | str) -> int:
    """Reads the train images and their captions in shuffled chunks, as an epoch of a fit does; bytes of features."""
    import torch

    from onceover.extract.store import FeatureStore
    from onceover.heads.chunks import Chunks, chunks_needed

    with FeatureStore(store) as opened:
        roles = opened.roles()
        count = chunks_needed(opened, roles.train, roles.selection, 2**31)
        plain = {kind: torch.nn.Identity() for kind in ("image", "text")}
        chunks = Chunks(opened, roles.train, opened.image_index, plain, count, "cpu")
        return sum(chunk.images.nbytes + chunk.texts.nbytes for chunk in chunks.epoch(np.random.default_rng(0)))


def write_parquet(folder: Path, images: int) -> None:
    """A dataset of so many images that are a few bytes each, in files of 100,000 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    pixels = b"\x89PNG\r\n\x1a\n"  # the beginning of one: no image is decoded here
    for number, start in enumerate(range(0, images, 100_000)):
        rows = range(start, min(start + 100_000, images))
        columns = {
            "image": [{"bytes": pixels + row.to_bytes(8, "big"), "path": image_name(row)} for row in rows],
            "caption": [caption(row) for row in rows],
            "split": ["dev" if row % 10 == 8 else "test" if row % 10 == 9 else "train" for row in rows],
        }
        pq.write_table(pa.table(columns), folder / f"part-{number:04d}.parquet")


def run_command(command: list) -> dict:
    """The seconds and the peak memory of a command, and its last line."""
    start = time.perf_counter()
    timed = [sys.executable, str(ROOT / "cli.py"), *map(str, command)]
    with subprocess.Popen(timed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(said)
    seconds = round(time.perf_counter() - start, 1)
    processor = round(usage.ru_utime + usage.ru_stime, 1)
    return {
        "seconds": seconds,
        "CPU_s": processor,
        "peak_MiB": round(usage.ru_maxrss / 1024),
        "said": said.splitlines()[-2:],
    }


if __name__ == "__main__":
    main()
