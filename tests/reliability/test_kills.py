"""Kills at random moments, and two commands at once."""

import pytest

from reliability.kills import try_kill
from reliability.pairs import try_reader, try_twice_at_once
from reliability.writers import WRITERS


@pytest.mark.parametrize("writer", ("import", "fit", "fit --force", "index"))
def test_a_killed_command_goes_on_to_the_same_result(trials, writer):
    for number in range(3):  # SIGKILL, SIGTERM, SIGINT
        verdict = try_kill(trials.warm, trials.workspace, WRITERS[writer], trials.clean(writer), 0, number)
        assert not verdict.is_fault, (number, verdict)


@pytest.mark.parametrize("writer", ("import", "fit", "ensemble"))
def test_one_of_two_writers_wins(trials, writer):
    verdict = try_twice_at_once(trials.warm, trials.workspace, WRITERS[writer], trials.clean(writer), 0, 0)
    assert not verdict.is_fault, verdict


@pytest.mark.parametrize("writer", ("fit --force", "index --images"))
def test_readers_see_the_old_result_or_the_new_one(trials, writer):
    verdict = try_reader(trials.warm, trials.workspace, writer, trials.clean(writer), 0, 0)
    assert not verdict.is_fault, verdict
