"""What enters an encoder's lowest thawed layer, cached on the disk: one file for images and one for captions.

HDF5, in one piece and mapped, so that a batch is gathered straight from the file (docs/store-format.md). No torch.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import check_disk, only_writer
from onceover.base.formats import ACTIVATIONS_FORMAT, ACTIVATIONS_VERSION
from onceover.base.hdf5 import DAMAGE, StoredRows, open_hdf5, write_hdf5

DTYPE = np.float16


class ActivationError(OnceoverError):
    """Activations that cannot be cached."""


class Maps:
    """A map, or a row of tokens, of each view of P images: float16 (P, V, …)."""

    def __init__(self, path: Path):
        with open_hdf5(path) as file:
            self._views = file["activations"].shape[1]
            self._values = StoredRows(file["activations"], path, leading=2)

    def gather(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """One view (B,) of each image (B,): (B, …)."""
        return self._values[rows * self._views + views]


class Tokens:
    """The tokens of M captions, without padding: float16 (sum of lengths, D), with each caption's first one."""

    def __init__(self, path: Path):
        with open_hdf5(path) as file:
            self._values = StoredRows(file["activations"], path)
            self._offsets = file["offsets"][:]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Captions (B,), each filled up with its last token to the longest one's length: (B, L, D)."""
        first = self._offsets[rows]
        lengths = self._offsets[rows + 1] - first
        ends = np.cumsum(lengths)
        tokens = self._values[np.arange(ends[-1]) + np.repeat(first - (ends - lengths), lengths)]
        places = (ends - lengths)[:, None] + np.arange(lengths.max())
        return tokens[np.minimum(places, ends[:, None] - 1)]


def write_activations(
    path: Path,
    fingerprint: str,
    shape: tuple[int, ...],
    batches: Callable[[], Iterable[np.ndarray]],
    what: str,
    say: Callable[[str], None],
    offsets: np.ndarray | None = None,
) -> None:
    """Writes the file, whole or not at all, unless one with this fingerprint is there.

    Args:
        shape: of all activations. batches: gives them, float (b, …), in order; called where they are needed.
        offsets: int64 (M + 1,), where each caption's tokens begin and the last one's end.

    Raises:
        FileError: no room. ActivationError: a number that float16 does not hold.
    """
    if _is_cached(path, fingerprint):  # others may read it at once
        say(f"{what}: cached activations are taken from {path}")
        return
    with only_writer(path, "the activations"):
        if not _is_cached(path, fingerprint):
            _write(path, fingerprint, shape, batches, what, say, offsets)


def _is_cached(path: Path, fingerprint: str) -> bool:
    """Whether activations with this fingerprint are there; of the large array, blocks are checked as they are read.

    Raises:
        ActivationError: a file that is damaged.
    """
    if not path.exists():
        return False
    try:
        with open_hdf5(path) as file:
            return file.attrs.get("fingerprint") == fingerprint
    except PermissionError:
        raise
    except DAMAGE as error:
        raise ActivationError(
            f"{path} is damaged ({first_line(error)}); remove it, and it is computed again"
        ) from error


def _write(path, fingerprint, shape, batches, what, say, offsets) -> None:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPE).itemsize
    say(f"{what}: caching what enters the lowest thawed layer, {size / 2**30:,.2f} GiB: {path}")
    check_disk(path, size)
    with write_hdf5(path, blocks_of=("activations",)) as writer:
        file = writer.file
        file.attrs["format"], file.attrs["format_version"] = ACTIVATIONS_FORMAT, ACTIVATIONS_VERSION
        file.attrs["fingerprint"] = fingerprint
        values, start = file.create_dataset("activations", shape, dtype=DTYPE), 0
        if offsets is not None:
            file["offsets"] = offsets
        with tqdm(total=shape[0], desc=what, unit=" rows", disable=None) as bar:
            for batch in batches():
                with np.errstate(over="ignore"):
                    batch = batch.astype(DTYPE)
                if not np.isfinite(batch).all():
                    raise ActivationError(
                        f"{what}: activations that are not finite float16 numbers cannot be cached; "
                        "thaw another layer, or add --no-cache"
                    )
                values[start : start + len(batch)] = batch
                writer.check()
                start += len(batch)
                bar.update(len(batch))
