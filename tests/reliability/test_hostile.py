"""Malicious files: no code of theirs runs, nothing outside is read or written, every command ends."""

import pytest

from reliability.hostile import CASES, try_case


@pytest.mark.parametrize("name", CASES)
def test_malicious_files_are_harmless(trials, name):
    verdict = try_case(trials, name)
    assert not verdict.is_fault, verdict
