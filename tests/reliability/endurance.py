"""Memory over many fits, many queries and many captions: it stays flat."""

import json
import sys
from pathlib import Path

import numpy as np

from reliability.session import Session
from reliability.trials import Command, Verdict, ending
from reliability.workspace import FIT

FITS, WARMING_FITS = 200, 20
QUERIES = 100_000
CAPTIONS_PER_IMAGE, IMAGES = 5, 200_000
OPENED = 12  # times that the large store is opened
GROWTH = 32 * 2**20  # bytes of resident memory that may be added between the first and the last tenth
QUERY_GROWTH = 2**29  # bytes that 100,000 queries may take more than 1,000: their texts, vectors and hits


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def repeat_fits(store: str, folder: str) -> None:
    """Fits again and again in this process and prints the resident memory after some of the fits."""
    from onceover.cli import cli

    sizes = []
    for number in range(FITS):
        options = [
            "fit",
            "--store",
            store,
            "--run",
            f"{folder}/run",
            *FIT,
            "--force",
            "--set",
            f"training.seed={number}",
        ]
        cli(options, prog_name="onceover", standalone_mode=False)
        if number + 1 in (WARMING_FITS, FITS):
            sizes.append(resident_bytes())
    json.dump(sizes, sys.stdout)


def fits(session: Session) -> Verdict:
    """Runs hundreds of fits in one process."""
    scratch = session.scratch()
    arguments = (str(session.workspace.store), str(scratch))
    command = Command(arguments, function="reliability.endurance:repeat_fits", cpu_seconds=2000, wait_seconds=4000)
    ended = session.warm.run(command)
    if verdict := ending(ended):
        return verdict
    early, late = json.loads(ended.stdout.splitlines()[-1])
    detail = f"{FITS} fits: {early / 2**20:.0f} MiB after {WARMING_FITS}, {late / 2**20:.0f} MiB in the end"
    return Verdict("right" if late - early < GROWTH else "grows", detail)


def queries(session: Session) -> Verdict:
    """Searches for many queries at once, and for a hundredth of them; compares the peaks of memory."""
    peaks = []
    for count in (QUERIES // 100, QUERIES):
        scratch = session.scratch()
        lines = (f"a red circle number {number} above a blue square\n" for number in range(count))
        (scratch / "queries.txt").write_text("".join(lines))
        options = ("--queries", str(scratch / "queries.txt"), "--format", "jsonl", "--device", "cpu")
        command = Command(("search", "--run", str(session.workspace.run), *options), memory=12 * 2**30)
        ended = session.warm.run(command.but(cpu_seconds=4000, wait_seconds=8000))
        if verdict := ending(ended):
            return verdict
        if len(ended.stdout.splitlines()) != count:
            return Verdict("silent difference", f"{len(ended.stdout.splitlines())} answers to {count} queries")
        peaks.append(ended.peak_bytes)
    detail = f"{QUERIES:,} queries: peak {peaks[1] / 2**20:.0f} MiB, of a hundredth {peaks[0] / 2**20:.0f} MiB"
    return Verdict("right" if peaks[1] - peaks[0] < QUERY_GROWTH else "grows", detail)


def write_large_store(folder: str) -> None:
    """Imports a million captions with tiny features, by the program's own command."""
    from onceover.cli import cli

    generator = np.random.default_rng(0)
    place = Path(folder)
    np.save(place / "images.npy", generator.standard_normal((IMAGES, 4), np.float32))
    np.save(place / "texts.npy", generator.standard_normal((IMAGES * CAPTIONS_PER_IMAGE, 4), np.float32))
    with open(place / "captions.csv", "w") as file:
        file.write("image,caption,split\n")
        for number in range(IMAGES):
            split = "dev" if number < 100 else "test" if number < 200 else "train"
            file.writelines(f"{number}.jpg,caption {turn} of {number},{split}\n" for turn in range(CAPTIONS_PER_IMAGE))
    options = ["import", "--image-features", f"{folder}/images.npy", "--text-features", f"{folder}/texts.npy"]
    options += ["--captions", f"{folder}/captions.csv", "--store", f"{folder}/large.h5"]
    cli(options, prog_name="onceover", standalone_mode=False)


def open_repeatedly(store: str) -> None:
    """Opens a store several times; prints the resident memory after half of them and in the end."""
    from onceover.extract.store import FeatureStore

    sizes = []
    for number in range(OPENED):
        with FeatureStore(Path(store)) as opened:
            opened.roles()
        if number + 1 in (OPENED // 2, OPENED):
            sizes.append(resident_bytes())
    json.dump(sizes, sys.stdout)


def captions(session: Session) -> Verdict:
    """Makes a store of a million captions, and opens it several times."""
    scratch = session.scratch()
    limits = {"cpu_seconds": 2000, "wait_seconds": 4000, "memory": 8 * 2**30}
    store = str(scratch / "large.h5")
    written = session.warm.run(Command((str(scratch),), function="reliability.endurance:write_large_store", **limits))
    if verdict := ending(written):
        return verdict
    opened = session.warm.run(Command((store,), function="reliability.endurance:open_repeatedly", **limits))
    if verdict := ending(opened):
        return verdict
    early, late = json.loads(opened.stdout.splitlines()[-1])
    (scratch / "images.npy").unlink()
    (scratch / "texts.npy").unlink()
    detail = (
        f"{IMAGES * CAPTIONS_PER_IMAGE:,} captions: importing took {written.peak_bytes / 2**20:.0f} MiB at most in "
        f"{written.seconds:.0f} s; opened {OPENED // 2} times, {early / 2**20:.0f} MiB, "
        f"after {OPENED} times {late / 2**20:.0f} MiB"
    )
    return Verdict("right" if late - early < GROWTH else "grows", detail)


CHECKS = {"fits": fits, "queries": queries, "captions": captions}
