"""Arrays that take a while to compute, kept in a file with a digest of what they were computed from."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from onceover.base.errors import OnceoverError, first_line
from onceover.base.npz import npz_bytes, read_npz
from onceover.base.outputs import OutputError, Outputs
from onceover.base.progress import LOGGER, warn

_ORIGIN = "origin"
Value = TypeVar("Value")


class KeptArrays:
    """A .npz file of a folder; where it cannot be read or written, that costs time alone.

    Args:
        folder: it need not be there. name: the file's.
        origin: a digest of all that the arrays depend on.
    """

    def __init__(self, folder: Path, name: str, origin: str):
        self._outputs = Outputs(folder, "move it elsewhere")
        self._name = name
        self._origin = origin

    def read(self, build: Callable[[dict[str, np.ndarray]], Value]) -> Value | None:
        """The value that ``build`` makes of the arrays; None where they are not kept, or are of something else.

        Args:
            build: raises, whatever it is, where the arrays are not what was written.
        """
        path = self._outputs.folder / self._name
        try:
            arrays = read_npz(path)
            if str(arrays[_ORIGIN]) != self._origin:
                return None
            value = build(arrays)
        except FileNotFoundError:
            return None
        except OSError as error:
            warn(f"{path} cannot be read, and is computed again: {first_line(error)}")
            return None
        except Exception as error:  # the parsers of NumPy and zipfile raise errors of many kinds
            warn(f"{path} is damaged, and is computed again: {first_line(error)}")
            return None
        LOGGER.debug("took %s", path)
        return value

    def write(self, arrays: dict[str, np.ndarray]) -> None:
        """Keeps arrays in the place of earlier ones; a file that was changed since it was written is set aside."""
        try:
            with self._outputs.locked():
                if (self._outputs.folder / self._name).is_symlink():
                    raise OutputError("it is a link")
                self._outputs.check_origin(self._name)
                self._outputs.set_aside(self._name)
                self._outputs.write_bytes(self._name, npz_bytes({_ORIGIN: np.array(self._origin), **arrays}))
        except (OSError, OnceoverError) as error:
            warn(f"{self._outputs.folder / self._name} is not kept for the next time: {first_line(error)}")

    def remove_others(self, is_stale: Callable[[str], bool]) -> None:
        """Removes those files that were kept in the folder and whose names say that they are of no use any more."""
        try:
            with self._outputs.locked():
                self._outputs.remove(is_stale)
        except (OSError, OnceoverError) as error:
            warn(f"files that are of no use any more stay in {self._outputs.folder}: {first_line(error)}")
