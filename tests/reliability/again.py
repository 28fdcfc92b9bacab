"""The same command again: equal to the bit, with one thread and with two."""

from pathlib import Path

import h5py
import numpy as np

from reliability.contents import difference
from reliability.faults import trial_name
from reliability.session import Session
from reliability.trials import Verdict, ending
from reliability.writers import WRITERS

BATCH_TOLERANCE = 1e-4  # of the features' spread, between batches of 8 and of 3
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def twice(session: Session, name: str) -> Verdict:
    """Runs a writer again in a process of its own, with one thread and with two, each compared with the first run."""
    clean = session.clean(name)
    for threads in ("1", "2"):
        scratch = WRITERS[name].start(session.workspace, trial_name(session.warm))
        command = WRITERS[name].command(session.workspace, scratch).allowing(clean.ended)
        environment = command.environment | dict.fromkeys(THREADS, threads)
        session.cold = True
        try:
            ended = session.run(command.but(environment=environment, wait_seconds=300.0))
        finally:
            session.cold = False
        if verdict := ending(ended):
            return verdict
        if differs := difference(clean.values, WRITERS[name].values(scratch)):
            return Verdict("silent difference", f"with {threads} threads: {differs}")
    return Verdict("right", "equal to the bit, with 1 and 2 threads")


def batch_sizes(session: Session) -> Verdict:
    """Extracts with batches of 8 and of 3; features agree within ``BATCH_TOLERANCE``."""
    clean = session.clean("extract")
    features = []
    for size in (8, 3):
        scratch = WRITERS["extract"].start(session.workspace, trial_name(session.warm))
        command = WRITERS["extract"].command(session.workspace, scratch).allowing(clean.ended)
        ended = session.run(command.but(arguments=(*command.arguments, "--batch-size", str(size))))
        if verdict := ending(ended):
            return verdict
        features.append(read_features(scratch / "s.h5"))
    worst = 0.0
    for first, second in zip(*features, strict=True):
        worst = max(worst, float(np.abs(first - second).max() / first.std()))
    outcome = "right" if worst <= BATCH_TOLERANCE else "silent difference"
    return Verdict(outcome, f"batches of 8 and 3: features differ by {worst:.1e} of their spread at most")


def read_features(path: Path) -> list[np.ndarray]:
    """Both kinds of features of a store."""
    with h5py.File(path, "r") as file:
        return [file[f"{kind}/features"][:] for kind in ("image", "text")]


CHECKS = {
    "extract": lambda session: twice(session, "extract"),
    "fit": lambda session: twice(session, "fit"),
    "sweep": lambda session: twice(session, "sweep"),
    "index": lambda session: twice(session, "index"),
    "batch sizes": batch_sizes,
}
