"""How long does each command take from a cold start, and how much processor time and memory?

    python benchmarks/bench_commands.py --store STORE.h5 --run RUN [--data DATA] [--program NAME=PATH/cli.py ...]
        [--rounds 5] [--busy 3] [--load idle] [--only evaluate --only search] [--out FILE.json]

Every command is a process of its own. With several programs, checkouts of several versions, they take turns. All is
measured twice: on the machine as it is, and beside ``--busy`` processes that do nothing but compute. Beside each
command stands its floor: the imports without which it could not work.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOADS = ("idle", "busy")
QUERY = "a dog playing in the park"
FLOORS = {  # by command, what it has to import at least
    "--help": "import click",
    "info": "import click, h5py",
    "evaluate": "import click, h5py, scipy.linalg, faiss",
    "compare": "import click, h5py, numpy",
    "plot": "import click, h5py, sklearn.manifold, matplotlib.figure",
    "index": "import click, h5py, faiss",
    "search": "import click, h5py, torch; from transformers import {text_class}",
    "ensemble": "import click, h5py, torch",
    "fit": "import click, h5py, torch",
    "extract": "import click, h5py, torch; from transformers import {text_class}",
}


class Cost(NamedTuple):
    """The cost of a process: seconds of the clock, seconds of processors, MiB at its peak."""

    wall: float
    cpu: float
    memory: float


def main() -> None:
    """Parses the options and prints a table of medians over rounds."""
    options = parsed()
    programs = dict(program.split("=", 1) for program in options.program or [f"here={ROOT / 'cli.py'}"])
    text_class = class_of_text_encoder(options.run)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        workspaces = {name: Workspace(Path(folder) / name, options, program) for name, program in programs.items()}
        for load in options.load or LOADS:
            with busy(options.busy if load == "busy" else 0):
                for _ in range(options.rounds):
                    for name, program in programs.items():
                        for label, arguments in workspaces[name].commands(options.only):
                            cost = run([sys.executable, program, *arguments])
                            rows.setdefault(f"{load}: {label}", {}).setdefault(name, []).append(cost)
                            floor = run([sys.executable, "-c", floor_of(arguments[0], text_class)])
                            rows[f"{load}: {label}"].setdefault("floor", []).append(floor)
    result = {label: {name: summary(costs) for name, costs in row.items()} for label, row in rows.items()}
    print_table(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="its first 64 images are encoded; without it, extract is left out")
    parser.add_argument("--program", action="append", metavar="NAME=PATH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=3, help="processes that compute beside it when it is busy")
    parser.add_argument("--load", action="append", choices=LOADS, help="measure only so; repeatable")
    parser.add_argument("--only", action="append", metavar="COMMAND")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class Workspace:
    """A folder with a store, two runs and an index of a program's own."""

    def __init__(self, folder: Path, options: argparse.Namespace, program: str):
        folder.mkdir()
        self._folder = folder
        self._data = options.data
        self._store = folder / "store.h5"
        self._runs = [folder / "run", folder / "other"]
        if same_disk(options.store, folder):
            os.link(options.store.resolve(), self._store)
        else:
            shutil.copy(options.store, self._store)
        for run_folder in self._runs:
            shutil.copytree(options.run, run_folder)
            for file in [*run_folder.glob("evaluation-*"), *run_folder.glob("map-*")]:
                file.unlink()
        self._index = folder / "index"
        run([sys.executable, program, "index", "--run", str(self._runs[0]), "--index", str(self._index)])

    def commands(self, only: list[str] | None) -> Iterator[tuple[str, list[str]]]:
        """Each command's label and arguments, those that are chosen; what the last round made is removed before."""
        for label, arguments, stale in self._all():
            if only and arguments[0] not in only:
                continue
            for path in stale:
                shutil.rmtree(path, ignore_errors=True)
                if path.is_file():
                    path.unlink()
            yield label, [str(argument) for argument in arguments]

    def _all(self) -> Iterator[tuple[str, list, list[Path]]]:
        """Labels, arguments, and the files that are removed before."""
        run_folder, other = self._runs
        ranks = self._folder / "store.h5.baselines"
        evaluate = ["evaluate", "--run", run_folder, "--store", self._store]
        figures = self._folder / "figures"
        output = self._folder / "output"
        yield "--help", ["--help"], []
        yield "info of the store", ["info", self._store], []
        yield "info of the run", ["info", run_folder], []
        yield "evaluate, the first", evaluate, [ranks]
        yield "evaluate, again", evaluate, []
        yield "compare", ["compare", run_folder, other], []
        plot = ["plot", "--run", run_folder, "--out", figures]
        yield "plot, the first", plot, [figures, *run_folder.glob("map-*")]
        yield "plot, again", plot, []
        yield "index of the run", ["index", "--run", run_folder, "--index", output / "index"], [output / "index"]
        yield "search of the run", ["search", "--run", run_folder, "--query", QUERY, "--device", "cpu"], []
        yield "search of the index", ["search", "--index", self._index, "--query", QUERY, "--device", "cpu"], []
        ensemble = ["ensemble", run_folder, other, "--out", output / "ensemble", "--store", self._store]
        yield "ensemble of two", ensemble, [output / "ensemble"]
        fit = ["fit", "--store", self._store, "--run", output / "fit", "--device", "cpu"]
        yield "fit, 3 epochs", [*fit, "--set", "training.num_epochs=3"], [output / "fit"]
        if self._data:
            store = output / "s.h5"
            extract = ["extract", "--data", self._data, "--store", store, "--limit", 64, "--device", "cpu"]
            yield "extract, 64 images", [*extract, *encoders_of(run_folder)], [store]


def same_disk(first: Path, second: Path) -> bool:
    """Whether two paths lie on one file system, so that a file can have a name in both."""
    return first.resolve().stat().st_dev == second.stat().st_dev


def encoders_of(run_folder: Path) -> list[str]:
    """The options of ``extract`` that name a run's encoders."""
    settings = json.loads((run_folder / "run.json").read_text())["extract"]
    return ["--image-encoder", settings["image_encoder"], "--text-encoder", settings["text_encoder"]]


def class_of_text_encoder(run_folder: Path) -> str:
    """The name of the class of a run's text encoder, in ``transformers``."""
    recipes = json.loads((run_folder / "run.json").read_text())["recipes"]
    return recipes["text"]["architecture"].split()[0]


def floor_of(command: str, text_class: str) -> str:
    """The program that only imports what a command needs."""
    return FLOORS[command].format(text_class=text_class)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Runs processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(command: list[str]) -> Cost:
    """Runs a process to its end."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=tempfile.gettempdir())
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def summary(costs: list[Cost]) -> dict:
    """Medians, and the range of the wall time."""
    walls = [cost.wall for cost in costs]
    return {
        "wall": round(statistics.median(walls), 3),
        "range": [round(min(walls), 3), round(max(walls), 3)],
        "cpu": round(statistics.median(cost.cpu for cost in costs), 3),
        "memory": round(statistics.median(cost.memory for cost in costs)),
    }


def print_table(result: dict[str, dict]) -> None:
    """Prints the results as Markdown."""
    names = list(next(iter(result.values())))
    print("| | " + " | ".join(f"{name}: s, CPU s, MiB" for name in names) + " |")
    print("| --- |" + " --- |" * len(names))
    for label, row in result.items():
        cells = []
        for name in names:
            numbers = row[name]
            low, high = numbers["range"]
            cells.append(f"{numbers['wall']:.2f} ({low:.2f}–{high:.2f}), {numbers['cpu']:.2f}, {numbers['memory']:,}")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
