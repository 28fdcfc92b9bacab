"""Failing system calls, full disks and bounded files: one line, the old result intact, and the next command goes on."""

import pytest

from reliability.faults import Fault, NotHere, positions, try_fault, try_file_size, try_small_disk
from reliability.writers import WRITERS

QUICK = ("import", "fit", "fit --force", "ensemble", "index")
FULL = Fault("write", "ENOSPC", lasting=True)


def positions_of(trials, writer, fault):
    return positions(trials.clean(writer).calls[fault.call], 1, 0)


@pytest.mark.parametrize("writer", QUICK)
@pytest.mark.parametrize("fault", [FULL, Fault("read", "EIO"), Fault("rename", "EACCES")], ids=lambda fault: fault.name)
def test_a_failing_call_is_one_line_and_the_next_command_goes_on(faulty, writer, fault):
    for number in positions_of(faulty, writer, fault):
        verdict = try_fault(faulty.warm, faulty.workspace, WRITERS[writer], faulty.clean(writer), fault, number)
        assert not verdict.is_fault, (number, verdict)


@pytest.mark.parametrize("writer", ("import", "fit"))
def test_a_file_system_that_cannot_flush_folders_will_do(faulty, writer):
    fault = Fault("fsync", "EINVAL")
    for number in positions_of(faulty, writer, fault):
        verdict = try_fault(faulty.warm, faulty.workspace, WRITERS[writer], faulty.clean(writer), fault, number)
        assert verdict.outcome == "right", (number, verdict)


@pytest.mark.parametrize("writer", ("import", "fit"))
def test_files_that_may_not_grow(trials, writer):
    verdict = try_file_size(trials.warm, trials.workspace, WRITERS[writer], trials.clean(writer), 20_000)
    assert not verdict.is_fault, verdict


@pytest.mark.parametrize("writer", ("fit", "index"))
def test_a_small_disk(trials, writer):
    try:
        verdict = try_small_disk(trials.warm, trials.workspace, WRITERS[writer], trials.clean(writer), 40_000)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert not verdict.is_fault, verdict


def test_positions_favour_the_end():
    numbers = positions(1000, 10, 0)
    assert len(numbers) == 10
    assert sum(number >= 900 for number in numbers) >= 5
    assert all(1 <= number <= 1000 for number in numbers)
    assert positions(0, 10, 0) == []
