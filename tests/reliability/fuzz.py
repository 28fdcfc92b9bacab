"""Corrupted inputs of each kind, a command that reads them, and a judgement of what it made of them.

A trial is repeated by its kind, the seed and its number. ``KINDS`` names the functions that run trials.
"""

from collections.abc import Callable

from reliability.fuzz_inputs import fuzz_captions, fuzz_images, fuzz_npy, fuzz_yaml, fuzz_zip
from reliability.fuzz_results import fuzz_activations, fuzz_indexes, fuzz_json, fuzz_runs, fuzz_stores, fuzz_sweeps
from reliability.session import Session
from reliability.trials import Verdict

KINDS: dict[str, Callable[[Session, int, int], Verdict]] = {
    "captions": fuzz_captions,
    "json": fuzz_json,
    "yaml": fuzz_yaml,
    "stores": fuzz_stores,
    "runs": fuzz_runs,
    "sweeps": fuzz_sweeps,
    "indexes": fuzz_indexes,
    "activations": fuzz_activations,
    "npy": fuzz_npy,
    "zip": fuzz_zip,
}
ALL_KINDS = ("images", *KINDS)


def run_trials(session: Session, kind: str, seed: int, numbers: list[int]) -> list[Verdict]:
    """Runs the trials with these numbers; images are encoded many at once."""
    if kind == "images":
        return fuzz_images(session, seed, numbers)
    return [KINDS[kind](session, seed, number) for number in numbers]
