"""Temporary files: an error that says what to do where there is no room for them."""

import contextlib
import sqlite3
from collections.abc import Iterator

from onceover.base.errors import OnceoverError


class TemporaryFileError(OnceoverError):
    """A temporary file that cannot be written."""


@contextlib.contextmanager
def temporary_files() -> Iterator[None]:
    """Turns the errors of the system, and of SQLite, into one with a way out, while temporary files are written.

    Raises:
        TemporaryFileError: there is no room for one, or no folder that can be written to.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TemporaryFileError(
            f"a temporary file cannot be written ({reason}); make room in the folder of temporary files, or name "
            "another one in the environment variable TMPDIR"
        ) from error
