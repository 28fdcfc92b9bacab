"""Can heads be fitted on a store that is larger than the memory, at what speed, and do they get worse?

    python benchmarks/bench_memory.py --folder DIR [--gib 4] [--out FILE.json]

Makes features of so many GiB in DIR, with something to learn in them (both sides are noisy linear images of a common
latent vector), imports them, and fits the default heads twice, each time in a process of its own: with the features in
memory, and with ``--memory 2GiB`` while the system refuses more than 2 GiB of anonymous memory (RLIMIT_DATA) and the
resident part of it (RssAnon) is sampled. Then evaluates, indexes and draws, within the same 2 GiB.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

VIEWS, IMAGE_DIM, TEXT_DIM, EACH, LATENT = 2, 2048, 768, 5, 128
HELD_OUT = 1000  # images of dev, and of test
BLOCK = 1000
LIMIT = 2 * 2**30


def main() -> None:
    """Parses the options and prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--noise", type=float, default=6.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    store = options.folder / "store.h5"
    if not store.exists():
        make(options, store)
    result: dict = {"machine": {"processor": platform.machine(), "cores": os.cpu_count()}}
    result["store_GiB"] = round(store.stat().st_size / 2**30, 2)
    for seed in range(options.seeds):
        for name, memory, limit in (("in 2 GiB", "2GiB", LIMIT), ("in memory", "16GiB", None)):
            run = options.folder / f"{name.replace(' ', '-')}-{seed}"
            settings = ["--set", f"training.num_epochs={options.epochs}", "--set", f"training.seed={seed}"]
            where = ["fit", "--store", store, "--run", run, "--memory", memory, "--force", "--device", "cpu"]
            found = measured([*where, *settings], limit) | fitted(run)
            result[f"fit {name}, seed {seed}"] = found
            print(name, seed, found, file=sys.stderr, flush=True)
    run = options.folder / "in-2-GiB-0"
    for command in (
        ["evaluate", "--run", run, "--memory", "2GiB"],
        ["index", "--run", run, "--index", options.folder / "index", "--memory", "500MiB", "--force"],
        ["plot", "--store", store, "--out", options.folder / "figures", "--memory", "2GiB"],
        ["plot", "--run", run, "--out", options.folder / "figures"],
    ):
        result[" ".join(map(str, command[:2]))] = measured(command, LIMIT)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def make(options, store: Path) -> None:
    """Features in .npy files, and the store that ``import`` makes of them."""
    each = 4 * (VIEWS * IMAGE_DIM + EACH * TEXT_DIM)
    pictures = int(options.gib * 2**30 / each / BLOCK) * BLOCK
    generator = np.random.default_rng(0)
    maps = [generator.standard_normal((LATENT, dim), np.float32) / LATENT**0.5 for dim in (IMAGE_DIM, TEXT_DIM)]
    files = [options.folder / name for name in ("images.npy", "texts.npy")]
    shapes = (pictures, VIEWS, IMAGE_DIM), (pictures, EACH, TEXT_DIM)
    arrays = [
        np.lib.format.open_memmap(file, "w+", np.float32, shape) for file, shape in zip(files, shapes, strict=True)
    ]
    for start in range(0, pictures, BLOCK):
        latent = generator.standard_normal((BLOCK, LATENT), np.float32)
        for array, mapping in zip(arrays, maps, strict=True):
            noise = generator.standard_normal((BLOCK, *array.shape[1:]), np.float32)
            array[start : start + BLOCK] = (latent @ mapping)[:, None] + options.noise * noise
    flat = np.lib.format.open_memmap(options.folder / "captions.npy", "w+", np.float32, (pictures * EACH, TEXT_DIM))
    flat[:] = arrays[1].reshape(flat.shape)
    with open(options.folder / "captions.csv", "w") as file:
        file.write("image,caption,split\n")
        for picture in range(pictures):
            split = "dev" if picture < HELD_OUT else "test" if picture < 2 * HELD_OUT else "train"
            file.writelines(f"{picture:07d}.jpg,image {picture} said {number},{split}\n" for number in range(EACH))
    files[1].unlink()
    command = ["import", "--image-features", files[0], "--text-features", options.folder / "captions.npy"]
    command += ["--captions", options.folder / "captions.csv", "--store", store, "--force"]
    print(measured(command, None), file=sys.stderr, flush=True)
    for file in (files[0], options.folder / "captions.npy"):
        file.unlink()


def measured(command: list, limit: int | None) -> dict:
    """Seconds and peaks of memory of one command; ``limit``: bytes of anonymous memory that it may have."""

    def refuse_more() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, command)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=refuse_more
    ) as process:
        peaks = dict.fromkeys(("RssAnon", "VmData"), 0)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            found = dict(line.split(":", 1) for line in status.splitlines())
            peaks = {name: max(peak, int(found.get(name, "0").split()[0])) for name, peak in peaks.items()}
            time.sleep(0.02)
        said = process.stderr.read().decode()
    print(said, file=sys.stderr, flush=True)
    if process.returncode:
        sys.exit(f"{command} failed")
    sizes = {f"peak_{name}_GiB": round(peak / 2**20, 2) for name, peak in peaks.items()}
    return {"seconds": round(time.perf_counter() - start, 1)} | sizes


def fitted(run: Path) -> dict:
    """What the run says of its fit, and its recalls on test, which played no part in it."""
    from onceover.base.files import read_json
    from onceover.retrieval.embeddings import read_embeddings
    from onceover.retrieval.metrics import quality

    made = read_json(run / "run.json", "the run")
    embeddings = read_embeddings(run / "embeddings.h5")
    pictures, captions, index = embeddings.split("test")
    report = quality(embeddings.images[pictures], embeddings.texts[captions], index)
    return {"fit_seconds": made["seconds"], "chunks": made["chunks"], "test_rsum": round(report["rsum"], 1)}


if __name__ == "__main__":
    main()
