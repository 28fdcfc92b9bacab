"""Some corrupted inputs of each kind; benchmarks/bench_reliability.py runs thousands."""

import pytest

from reliability.fuzz import run_trials

COUNTS = {
    "images": 24,
    "captions": 6,
    "json": 6,
    "yaml": 6,
    "stores": 6,
    "runs": 6,
    "sweeps": 4,
    "indexes": 5,
    "npy": 6,
    "zip": 5,
    "activations": 2,
}


@pytest.mark.parametrize("kind", COUNTS)
def test_corrupted_inputs_give_the_right_result_or_one_line(trials, kind):
    verdicts = run_trials(trials, kind, 0, list(range(COUNTS[kind])))
    faults = [f"{kind}:{number} {verdict}" for number, verdict in enumerate(verdicts) if verdict.is_fault]
    assert not faults, "\n".join(faults)


def test_the_same_number_is_the_same_trial(trials):
    assert run_trials(trials, "npy", 0, [3]) == run_trials(trials, "npy", 0, [3])
