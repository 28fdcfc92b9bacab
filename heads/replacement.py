"""Run folders: which are ours, what they consist of, and how a new run takes the place of an old one. No torch.

A run that replaces another is made in the hidden folder ``.next`` within. Once it is complete, it becomes ``.swap``,
which decides: from then on the old run is given up, and whatever command comes next on that folder ends the swap.
"""

import os
import shutil
from pathlib import Path

from onceover.base.errors import OnceoverError
from onceover.base.files import only_writer, open_regular, remove_asides, remove_files, write_bytes
from onceover.base.formats import (
    CONFIG,
    EMBEDDINGS,
    ENCODERS,
    FINETUNED,
    HEADS,
    HISTORY,
    NEXT,
    PROVENANCE,
    RESUME,
    RUN_FORMAT,
    SHUFFLED,
    SWAP,
    TOKENIZER,
    TRIAL,
)
from onceover.base.outputs import Outputs
from onceover.extract.encoder_files import ENCODER_FILES, TOKENIZER_FILES
from onceover.extract.store import KINDS

_CLEARED = ".cleared"  # in SWAP: the files of the old run are gone


class RunError(OnceoverError):
    """A run folder that is missing, unfinished, damaged, or of other settings or features."""


def holds_run(folder: Path) -> bool:
    """Whether ``folder`` is a run of this program, finished or not, whatever its version, damaged or not."""
    if any((folder / name).is_file() for name in (RESUME, FINETUNED, _CLEARED)) or is_swapping(folder):
        return True
    if not (folder / PROVENANCE).is_file():
        return False
    with open_regular(folder / PROVENANCE) as file:
        return RUN_FORMAT.encode() in file.read(2**20)


def is_swapping(folder: Path) -> bool:
    """Whether a complete new run is about to take the place of the one in ``folder``."""
    return (folder / SWAP).is_dir() and holds_run(folder / SWAP)


def claim_folder(folder: Path) -> None:
    """Sees that nothing but a run is in a folder, and ends a replacement that was interrupted.

    Raises:
        RunError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is no folder; name a new one")
    if folder.exists() and any(folder.iterdir()) and not holds_run(folder):
        raise RunError(f"{folder} is not empty and no run; name a new folder")
    for within in (folder / NEXT, folder / SWAP):
        if within.exists() and not (within.is_dir() and (holds_run(within) or not any(within.iterdir()))):
            raise RunError(f"{within} is where a run is replaced, and holds something else; move it elsewhere")
    for within in (folder / TOKENIZER, folder / NEXT, folder / NEXT / TOKENIZER, folder / SWAP):
        if within.is_dir():
            remove_asides(within)
    _end_swap(folder)


def place_to_work(folder: Path, force: bool) -> Path:
    """Where a run is made: its folder, or, where a finished one is to be replaced, a hidden folder within."""
    is_finished = any((folder / name).exists() for name in (PROVENANCE, FINETUNED))
    return folder / NEXT if force and is_finished else folder


def remove_run(folder: Path) -> None:
    """Removes what a run consists of, its resume state aside; files of other names stay."""
    for name in (PROVENANCE, FINETUNED, CONFIG, HEADS, HISTORY, EMBEDDINGS):
        (folder / name).unlink(missing_ok=True)
    Outputs(folder, "").remove(lambda name: name.startswith(("evaluation-", "errors-")))
    remove_files(folder / TOKENIZER, TOKENIZER_FILES)
    for kind in KINDS:
        encoder = folder / ENCODERS / kind
        if encoder.is_dir():
            remove_files(encoder, [file.name for file in encoder.iterdir() if ENCODER_FILES.fullmatch(file.name)])
    remove_files(folder / ENCODERS, [])
    shutil.rmtree(folder / TRIAL, ignore_errors=True)
    if (folder / SHUFFLED).is_dir():
        remove_run(folder / SHUFFLED)
        remove_files(folder / SHUFFLED, [RESUME])


def take_place(work: Path, folder: Path) -> None:
    """Lets a run that was made in a hidden folder take the place of the one that it replaces."""
    if work == folder:
        return
    os.replace(work, folder / SWAP)
    _end_swap(folder)


def end_interrupted_swap(folder: Path) -> None:
    """Ends a replacement that a kill or a failing disk interrupted, if there is one."""
    if is_swapping(folder):
        with only_writer(folder, "the run"):
            _end_swap(folder)


def _end_swap(folder: Path) -> None:
    """Moves the files of a complete new run into the folder, ``run.json`` last, once those of the old one are gone."""
    swap = folder / SWAP
    if not is_swapping(folder):
        return
    if not (swap / _CLEARED).exists():
        remove_run(folder)
        (folder / RESUME).unlink(missing_ok=True)
        write_bytes(swap / _CLEARED, b"")
    files = [file for file in swap.rglob("*") if file.is_file() and file.name != _CLEARED]
    last = (FINETUNED, PROVENANCE)
    for file in sorted(files, key=lambda file: (file.name in last, file.name == PROVENANCE, str(file))):
        target = folder / file.relative_to(swap)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(swap)
