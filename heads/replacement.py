"""Run folders: recognises them, lists their files, and replaces a finished run by a new one. No torch.

A run's files are those in the folder's record (``base.outputs``), whatever else lies beside them. A run that replaces
another is written to the hidden folder ``.next`` within. Once complete, it is renamed to ``.swap``. From then on the
old run is given up, and the next command on that folder ends the swap, if this one does not::

    run.json …            the old run, as long as the new one is incomplete
    .next/config.yaml …   the new run, incomplete
    .swap/run.json …      the new run, complete: its files replace the old ones, run.json last
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from onceover.base.errors import OnceoverError
from onceover.base.files import (
    MAX_TEXT,
    FileError,
    file_sha256,
    files_within,
    only_writer,
    open_regular,
    read_bytes,
    read_record,
    remove_asides,
    remove_files,
    visible_names,
    write_bytes,
)
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
    SWAP,
    TOKENIZER,
)
from onceover.base.hdf5 import stated_checksum
from onceover.base.outputs import RECORD, Outputs
from onceover.extract.encoder_files import ENCODER_FILES, TOKENIZER_FILES
from onceover.extract.store import KINDS

_REPLACES = ".replaces"  # in SWAP: which run is to be replaced
_BEGUN = ".begun"  # in SWAP: the files of the old run are being removed
_CLEARED = ".cleared"  # in SWAP: they are gone
_MARKS = (RESUME, FINETUNED, PROVENANCE)  # the files that make a folder a run, in the order in which they appear
_FILES = (CONFIG, HEADS, HISTORY, EMBEDDINGS, *_MARKS)
_FOLDERS = (f"{TOKENIZER}/", f"{ENCODERS}/")
_RESULTS = ("evaluation-", "errors-", "map-")


class RunError(OnceoverError):
    """A run folder that is missing, unfinished, damaged, or of other settings or features."""


def run_files(folder: Path) -> Outputs:
    """The record of the run's files in a folder; they are written through it, so that no others are ever replaced."""
    return Outputs(folder, "move it elsewhere, or name another folder for the run")


def holds_run(folder: Path) -> bool:
    """Whether ``folder`` is a run of this program, finished or not, whatever its version, damaged or not."""
    outputs = run_files(folder)
    if any(outputs.holds(name) for name in _MARKS) or is_swapping(folder) or _is_finetuned(folder / FINETUNED):
        return True
    if not (folder / PROVENANCE).is_file():
        return False
    with open_regular(folder / PROVENANCE) as file:
        return RUN_FORMAT.encode() in file.read(2**20)


def _is_finetuned(path: Path) -> bool:
    """Whether a file is ``finetune.json``; earlier versions kept no record of a run's files."""
    if not path.is_file():
        return False
    try:
        return {"request", "unfreeze", "weights"} <= read_record(path, "the record of a fine-tuning").keys()
    except FileError:
        return False


def is_swapping(folder: Path) -> bool:
    """Whether a complete new run is about to take the place of the one in ``folder``."""
    swap = folder / SWAP
    if swap.is_symlink() or not (swap / RECORD).is_file():
        return False
    if (swap / _BEGUN).is_file() or (swap / _CLEARED).is_file():
        return True
    return (swap / _REPLACES).is_file() and read_bytes(swap / _REPLACES, MAX_TEXT) == _mark_of(folder)


def _mark_of(folder: Path) -> bytes:
    """Tells the run in a folder from others, for the one that is to take its place."""
    marks = [file_sha256(folder / name) for name in (FINETUNED, PROVENANCE) if (folder / name).is_file()]
    return " ".join(marks).encode()


def claim_folder(folder: Path) -> None:
    """Checks that a folder is empty or holds a run whose files are ours, and ends an interrupted replacement.

    Raises:
        RunError: it holds something else. OutputError: a file of somebody else's has a name that a run needs.
    """
    if not folder.is_dir() and os.path.lexists(folder):
        raise RunError(f"{folder} is no folder; name a new one")
    if not _is_empty(folder) and not holds_run(folder):
        raise RunError(f"{folder} is not empty and no run; name a new folder")
    for within in (folder / NEXT, folder / SWAP):
        if _is_folder(within):
            remove_asides(within)
    is_sound = {
        folder / NEXT: _is_folder(folder / NEXT) and (_is_empty(folder / NEXT) or holds_run(folder / NEXT)),
        folder / SWAP: _is_folder(folder / SWAP) and (_is_empty(folder / SWAP) or is_swapping(folder)),
    }
    for within, sound in is_sound.items():
        if os.path.lexists(within) and not sound:
            raise RunError(f"{within} is where a run is replaced, and holds something else; move it elsewhere")
    _end_swap(folder)
    for leftover in (folder / NEXT, folder / SWAP):
        if _is_empty(leftover):
            remove_files(leftover, [RECORD, _REPLACES])
    _put_back(folder)
    outputs = run_files(folder)
    for name in (TOKENIZER, *(f"{ENCODERS}/{kind}" for kind in KINDS)):
        outputs.check_links(f"{name}/*")
    if holds_run(folder) and not any(outputs.holds(name) for name in _MARKS):
        outputs.adopt(_verified_names(folder))  # an earlier version kept no record of them
    for name in _names_in(folder):
        outputs.check_origin(name)


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _is_empty(folder: Path) -> bool:
    """Whether nothing but hidden files is in a folder, or there is none."""
    return not visible_names(folder)


def _verified_names(folder: Path) -> list[str]:
    """The files of a run without a record that ``run.json`` or their own digests show to be as they were written."""
    names = []
    for name in (PROVENANCE, FINETUNED):
        with contextlib.suppress(FileError):
            record = read_record(folder / name, "the run's provenance")
            names.append(name)
            files = record.get("files", {})
            names += [file for file, sha256 in files.items() if _has_digest(folder / file, sha256)]
            stated = record.get("embeddings")
            if stated and (folder / EMBEDDINGS).is_file() and stated_checksum(folder / EMBEDDINGS) == stated:
                names.append(EMBEDDINGS)
    return list(dict.fromkeys(names))


def _has_digest(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this SHA-256."""
    return path.is_file() and not path.is_symlink() and file_sha256(path) == sha256


def _names_in(folder: Path) -> Iterator[str]:
    """The names of all files in a folder that have the names of a run's files."""
    yield from (name for name in _FILES if os.path.lexists(folder / name))
    yield from (f"{TOKENIZER}/{name}" for name in sorted(TOKENIZER_FILES) if (folder / TOKENIZER / name).is_file())
    for kind in KINDS:
        names = files_within(folder / ENCODERS / kind)
        yield from (f"{ENCODERS}/{kind}/{name}" for name in names if ENCODER_FILES.fullmatch(name))


def working_folder(folder: Path, force: bool) -> Path:
    """The folder to write a run to: its own, or, where a finished one is to be replaced, a hidden one within."""
    is_finished = any((folder / name).exists() for name in (PROVENANCE, FINETUNED))
    if force and is_finished:
        return folder / NEXT
    return folder


def remove_run(folder: Path) -> None:
    """Removes the files of a run and its results, the state of an unfinished one aside; all other files stay."""
    run_files(folder).remove(lambda name: name != RESUME and _is_of_run(name))
    _remove_empty_folders(folder)


def _is_of_run(name: str) -> bool:
    """Whether a name in a folder's record is one of a run's, or of its evaluation's."""
    return name in _FILES or name.startswith((*_FOLDERS, *_RESULTS))


def _remove_empty_folders(folder: Path) -> None:
    modules = [path.relative_to(folder).as_posix() for path in folder.glob(f"{ENCODERS}/*/[0-9]*_*")]
    for name in (TOKENIZER, *modules, *(f"{ENCODERS}/{kind}" for kind in KINDS), ENCODERS):
        if not (folder / name).is_symlink():
            remove_files(folder / name, [])


def take_over(work: Path, folder: Path) -> None:
    """Replaces a run by the one that was written to a hidden folder within (``working_folder``)."""
    if work == folder:
        return
    write_bytes(work / _REPLACES, _mark_of(folder))
    os.replace(work, folder / SWAP)
    _end_swap(folder)


def end_interrupted_swap(folder: Path) -> None:
    """Ends a replacement that a kill or a failing disk interrupted, if there is one."""
    if is_swapping(folder):
        with only_writer(folder, "the run"):
            _end_swap(folder)


def _end_swap(folder: Path) -> None:
    """Moves the files of a complete new run into the folder, ``run.json`` last, once those of the old one are gone."""
    if not is_swapping(folder):
        return
    swap = folder / SWAP
    outputs = run_files(folder)
    with outputs.locked():
        if not (swap / _CLEARED).exists():
            write_bytes(swap / _BEGUN, b"")
            outputs.remove(_is_of_run)
            _remove_empty_folders(folder)
            write_bytes(swap / _CLEARED, b"")
        last = (FINETUNED, PROVENANCE)
        names = sorted(run_files(swap).names(), key=lambda name: (name in last, name == PROVENANCE, name))
        for name in names:
            if (swap / name).is_file():
                outputs.move_in(swap / name, name)
    _remove_empty_folders(swap)
    remove_files(swap, [_REPLACES, _BEGUN, _CLEARED, RECORD])  # in this order: what is left still says what it is
    _put_back(folder)


def _put_back(folder: Path) -> None:
    """Gives a folder in which other people's hidden files are left the name under which it was made."""
    swap = folder / SWAP
    is_left = _is_folder(swap) and _is_empty(swap) and not is_swapping(folder)
    if is_left and not (folder / NEXT).exists():
        os.replace(swap, folder / NEXT)
