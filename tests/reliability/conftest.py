"""One warmed process and one BASE for all tests of a worker; the workers share BASE."""

import os

import pytest

from reliability.session import Session, open_session


@pytest.fixture(scope="session")
def trials(tmp_path_factory):
    """What runs trials."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open_session(folder / "reliability") as session:
        yield session


@pytest.fixture
def faulty(trials) -> Session:
    """The same, where system calls can be made to fail."""
    if trials.no_faults:
        pytest.skip(f"system calls cannot be made to fail here: {trials.no_faults}")
    return trials
