"""How much of a command's time goes to checking what it reads?

    python benchmarks/bench_checks.py --store STORE.h5 [--rounds 3] [--out FILE.json]

Fits the default heads on the store (for ``--epochs``), searches the run, indexes it and searches the index, in this
process, and adds up the seconds within the functions that compare files with their checksums. The share of a short fit
is an upper bound of a long one's, since a block is checked once.
"""

import argparse
import contextlib
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

from bench_fit import machine

CHECKS = (
    ("onceover.base.hdf5", "check_bytes"),
    ("onceover.extract.store", "check_bytes"),
    ("onceover.base.hdf5.StoredRows", "_check"),
    ("onceover.heads.provenance", "checked_file"),
    ("onceover.heads.checkpoint", "file_sha256"),
)


def main() -> None:
    """Parses the options and prints the seconds of each command and of its checks, medians over rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for module in ("heads.checkpoint", "heads.training", "retrieval.index"):
        importlib.import_module(f"onceover.{module}")  # before the clock starts: imports are no part of it
    rounds = [one_round(options.store, options.epochs) for _ in range(options.rounds)]
    result: dict = {"machine": machine(), "epochs": options.epochs, "commands": {}}
    for name in rounds[0]:
        seconds = statistics.median(each[name][0] for each in rounds)
        checks = statistics.median(each[name][1] for each in rounds)
        row = {"seconds": round(seconds, 2), "checks": round(checks, 3), "percent": round(100 * checks / seconds, 1)}
        result["commands"][name] = row
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def one_round(store: Path, epochs: int) -> dict[str, tuple[float, float]]:
    """Seconds of each command, and those within its checks."""
    with tempfile.TemporaryDirectory() as folder:
        run, index = Path(folder) / "run", Path(folder) / "index"
        fit = ("fit", "--store", store, "--run", run, "--set", f"training.num_epochs={epochs}")
        query = ("search", "--run", run, "--query", "a dog playing in the park", "--device", "cpu")
        return {
            "fit": timed(*fit),
            "search": timed(*query),
            "index": timed("index", "--run", run, "--index", index),
            "search of the index": timed("search", "--index", index, *query[3:]),
        }


def timed(*arguments) -> tuple[float, float]:
    """Seconds that a command takes, and those within the functions that check."""
    from click.testing import CliRunner

    from onceover.cli import cli

    spent = [0.0]
    with counted(spent):
        begun = time.perf_counter()
        ended = CliRunner().invoke(cli, [str(part) for part in arguments])
        seconds = time.perf_counter() - begun
    if ended.exit_code:
        sys.exit(ended.output)
    return seconds, spent[0]


@contextlib.contextmanager
def counted(spent: list[float]) -> Iterator[None]:
    """Adds the time within the checking functions to ``spent``."""
    from pkgutil import resolve_name

    def clocked(function: Callable) -> Callable:
        def call(*arguments, **options):
            begun = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - begun

        return call

    with contextlib.ExitStack() as patches:
        for place, name in CHECKS:
            holder = resolve_name(place)
            patches.enter_context(patch.object(holder, name, clocked(getattr(holder, name))))
        yield


if __name__ == "__main__":
    main()
