"""What does a grid cost, beside its points fitted one after another, and beside their bare matrix products?

    python benchmarks/bench_sweep.py --store STORE.h5 [--out FILE.json]

8 temperatures × 4 dimensions × 2 seeds, short fits, in one process: the products of all steps alone, stacked as the
sweep stacks them; the sweep; the sweep with ``--halving``; and the points one after another (features read and
standardised once, as a loop in Python would). Times are of reading, training and looking at the selection pictures:
once, at the end of a fit, and with ``--halving`` after each epoch. What looking after each epoch adds to the points
one after another is told as well, beside which ``--halving`` is the same fits.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench_fit import machine, seconds_a_step

GRID = ["model.temperature=0.01,0.02,0.03,0.05,0.07,0.1,0.15,0.2", "model.embedding_dim=128,256,512,1024"]
SEEDS = 2


def main() -> None:
    """Parses the options and prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch

    from onceover import cli  # sets what torch reads when it starts
    from onceover.extract.store import FeatureStore
    from onceover.heads import sweep as module
    from onceover.heads.grid import expand, trial_name
    from onceover.heads.stacking import steps_per_epoch, train_epochs
    from onceover.heads.sweep import sweep
    from onceover.heads.training_data import TrainingData
    from onceover.retrieval.leaderboard import Judge, leaderboard

    assert cli
    short = [f"training.num_epochs={options.epochs}", "training.batch_size=256", "model.learn_temperature=false"]
    settings = expand(None, [*short, f"training.check_every={options.epochs}"], GRID, SEEDS)
    looking = expand(None, [*short, "training.check_every=1"], GRID, SEEDS)
    configs = [config for point in settings for config in point.configs]
    seconds: dict[str, float] = {}
    tables: dict[str, list[dict]] = {}
    with FeatureStore(options.store) as store, tempfile.TemporaryDirectory() as folder:
        roles, place = store.roles(), torch.device("cpu")
        data = TrainingData(store, roles, place, 2**34)
        steps = steps_per_epoch(*data.chunks_of(configs[0]), configs[0].training)
        at_once, pictures = module.AT_ONCE["cpu"], len(roles.train) / steps
        shapes = {config.model.embedding_dim: config for config in configs}

        def products() -> float:
            each = [seconds_a_step(config, pictures, at_once, data.dims) for config in shapes.values()]
            return options.epochs * steps * sum(each) * len(configs) / len(shapes) / at_once

        bare = [products()]
        for name, points in (("sweep", settings), ("sweep, halving", looking)):
            judge, start = Judge(), time.perf_counter()
            results = sweep(store, Path(folder) / name, points, judge, halving=points is looking)
            seconds[name] = time.perf_counter() - start
            named = [(point.values, [trial_name(config) for config in point.configs]) for point in points]
            tables[name] = leaderboard(judge, named, results, roles.selection_name)
            print(name, seconds[name], file=sys.stderr, flush=True)
        bare.append(products())
        start, looks = time.perf_counter(), 0.0
        data = TrainingData(store, roles, place, 2**34)
        for config in (config for point in looking for config in point.configs):
            trial, dealt = data.new_trial(config), data.chunks_of(config)
            while not trial.finished:
                train_epochs([trial], *dealt, trial.until_validation)
                begun = time.perf_counter()
                data.validate(trial)
                looks += time.perf_counter() - begun
        seconds["one after another, looking after each epoch"] = time.perf_counter() - start
        seconds["one after another"] = time.perf_counter() - start - looks * (1 - 1 / options.epochs)
        bare.append(products())
        seconds["products"] = statistics.median(bare)
    ends = {name: next(row for row in table if row["verdict"] == "best") for name, table in tables.items()}
    full = {tuple(row[key] for key in settings[0].values): row for row in tables["sweep"]}
    chosen = full[tuple(ends["sweep, halving"][key] for key in settings[0].values)]
    result = {"machine": machine(), "points": len(configs), "epochs": options.epochs}
    result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    for name, other in (
        ("sweep", "products"),
        ("one after another", "products"),
        ("sweep", "one after another"),
        ("sweep, halving", "one after another"),
        ("sweep, halving", "one after another, looking after each epoch"),
    ):
        result[f"{name} / {other}"] = round(seconds[name] / seconds[other], 2)
    result["best"] = {name: {key: row[key] for key in (*settings[0].values, "rsum")} for name, row in ends.items()}
    result["halving's best in the full grid"] = {
        key: chosen[key] for key in ("rsum", "difference", "difference_low", "difference_high", "verdict")
    }
    result["dropped"] = sum(row["outcome"] == "dropped" for row in tables["sweep, halving"])
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
