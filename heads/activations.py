"""Caches on disk the activations that enter an encoder's lowest unfrozen layer: one file for images, one for captions.

HDF5, contiguous, so that a batch is gathered straight from the file (docs/store-format.md). No torch.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from onceover.base.errors import OnceoverError, first_line
from onceover.base.files import check_disk, only_writer
from onceover.base.formats import ACTIVATIONS_FORMAT, ACTIVATIONS_VERSION
from onceover.base.hdf5 import DAMAGE, StoredRows, open_hdf5, write_hdf5
from onceover.base.progress import ProgressBar, say

DTYPE = np.float16


class ActivationError(OnceoverError):
    """Activations that cannot be cached."""


class ImageActivations:
    """Cached activations of each view of P images: float16 (P, V, …), a feature map or rows of tokens per view."""

    def __init__(self, path: Path):
        with open_hdf5(path) as file:
            self._views = file["activations"].shape[1]
            self._values = StoredRows(file["activations"], path, leading=2)

    def gather(self, images: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Reads one view (B,) of each image (B,): float16 (B, …)."""
        return self._values[images * self._views + views]


class CaptionActivations:
    """Cached activations of the tokens of M captions, without padding: float16 (sum of lengths, D)."""

    def __init__(self, path: Path):
        with open_hdf5(path) as file:
            self._values = StoredRows(file["activations"], path)
            self._offsets = file["offsets"][:]

    def gather(self, captions: np.ndarray) -> np.ndarray:
        """Reads captions (B,), each padded with its last token to the longest one's length: float16 (B, L, D).

        Captions of two and of three tokens, a and b::

            stored  … a0 a1 … b0 b1 b2 …
            tokens  a0 a1 b0 b1 b2              starts 0 2, ends 2 5
            result  [[a0 a1 a1], [b0 b1 b2]]
        """
        offsets = self._offsets[captions]
        lengths = self._offsets[captions + 1] - offsets
        ends = np.cumsum(lengths)
        starts = ends - lengths
        tokens = self._values[np.arange(ends[-1]) + np.repeat(offsets - starts, lengths)]
        positions = starts[:, None] + np.arange(lengths.max())
        return tokens[np.minimum(positions, ends[:, None] - 1)]


def write_activations(
    path: Path,
    fingerprint: str,
    shape: tuple[int, ...],
    batches: Callable[[], Iterable[np.ndarray]],
    noun: str,
    offsets: np.ndarray | None = None,
) -> None:
    """Writes the file, whole or not at all, unless one with this fingerprint is there.

    Args:
        shape: of all activations.
        batches: gives them, float (b, …), in order; called only where they are needed.
        noun: ``images`` or ``captions``, for messages.
        offsets: int64 (M + 1,), where the tokens of each caption begin, and the last one's end.

    Raises:
        FileError: the disk is too full. ActivationError: a number that float16 does not hold.
    """
    if _is_cached(path, fingerprint):  # others may read it at once
        say(f"{noun}: cached activations are taken from {path}")
        return
    with only_writer(path, "the activations"):
        if not _is_cached(path, fingerprint):
            _write(path, fingerprint, shape, batches, noun, offsets)


def _is_cached(path: Path, fingerprint: str) -> bool:
    """Whether activations with this fingerprint are there; blocks of the large array are checked as they are read.

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


def _write(
    path: Path,
    fingerprint: str,
    shape: tuple[int, ...],
    batches: Callable[[], Iterable[np.ndarray]],
    noun: str,
    offsets: np.ndarray | None,
) -> None:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPE).itemsize
    say(f"{noun}: caching the activations below the lowest unfrozen layer, {size / 2**30:,.2f} GiB: {path}")
    check_disk(path, size)
    with write_hdf5(path, blocks_of=("activations",)) as writer:
        file = writer.file
        file.attrs["format"] = ACTIVATIONS_FORMAT
        file.attrs["format_version"] = ACTIVATIONS_VERSION
        file.attrs["fingerprint"] = fingerprint
        dataset = file.create_dataset("activations", shape, dtype=DTYPE)
        if offsets is not None:
            file["offsets"] = offsets
        start = 0
        with ProgressBar(noun, "rows", total=shape[0]) as bar:
            for batch in batches():
                with np.errstate(over="ignore"):
                    values = batch.astype(DTYPE)
                if not np.isfinite(values).all():
                    raise ActivationError(
                        f"{noun}: activations that are not finite float16 numbers cannot be cached; "
                        "unfreeze another layer, or add --no-cache"
                    )
                dataset[start : start + len(values)] = values
                writer.check()
                start += len(values)
                bar.update(len(values))
