"""Reads a run's provenance without its heads and without torch, which takes memory and seconds to load."""

import hashlib
from pathlib import Path
from typing import Any

from onceover.base.files import FileError, read_bytes, read_record
from onceover.base.formats import EMBEDDINGS, FINETUNED, HEADS, PROVENANCE, RESUME, RUN_FORMAT, RUN_VERSION
from onceover.base.hdf5 import stated_checksum
from onceover.configs.schema import ConfigError
from onceover.extract.store import named_store, store_exists
from onceover.heads.replacement import RunError, end_interrupted_swap

MAX_HEADS = 2**36  # bytes


def read_provenance(folder: str | Path) -> dict:
    """Reads ``run.json``, and checks the run's other small files by it.

    Raises:
        RunError: no finished run there, or a file that is not as the fit wrote it.
    """
    folder = Path(folder)
    end_interrupted_swap(folder)
    if not (folder / PROVENANCE).is_file():
        raise RunError(_why_unfinished(folder))
    provenance = read_record(folder / PROVENANCE, "the run's provenance", strict=False)
    if (provenance.get("format"), provenance.get("format_version")) != (RUN_FORMAT, RUN_VERSION):
        raise RunError(f"{folder / PROVENANCE} is not of this program's format {RUN_VERSION}; fit again")
    provenance = read_record(folder / PROVENANCE, "the run's provenance")
    for name in provenance["files"]:
        if name != HEADS:  # large, and checked when it is loaded
            checked_file(folder, name, provenance)
    _check_embeddings(folder / EMBEDDINGS, provenance)
    return provenance


def _check_embeddings(path: Path, provenance: dict) -> None:
    """Refuses embeddings of another run. Damage is found later, when they are read.

    Raises:
        RunError: they are not those that the fit wrote.
    """
    stated = provenance.get("embeddings")  # earlier versions did not write it down
    if stated and path.is_file() and stated_checksum(path) != stated:
        raise RunError(
            f"{path} is not the file that the fit wrote, or is damaged; restore it, or fit again with --force"
        )


def checked_file(folder: Path, name: str, provenance: dict) -> bytes:
    """Reads a run's file, and checks that it is as the fit wrote it.

    Raises:
        RunError: it is not, or it is missing.

    """
    try:
        data = read_bytes(folder / name, MAX_HEADS)
    except (OSError, FileError) as error:
        raise RunError(f"{folder / name} is missing or cannot be read ({error}); fit again") from error
    if hashlib.sha256(data).hexdigest() != provenance["files"].get(name):
        raise RunError(f"{folder / name} is damaged, or was changed since the fit; restore it, or fit again")
    return data


def check_space(folder: Path, provenance: dict[str, Any], space: str) -> None:
    """Refuses vectors that other heads than a run's have made.

    Raises:
        RunError: they are of another space.
    """
    if space != provenance["space"]:
        raise RunError(f"the vectors were not made by the heads of {folder}; fit again, or name their own run")


def _why_unfinished(folder: Path) -> str:
    if (folder / FINETUNED).is_file():
        return (
            f"the encoders in {folder} are fine-tuned, and no features of theirs are there yet; run the same "
            "finetune command again with --re-extract"
        )
    if (folder / RESUME).is_file():
        return f"the fit in {folder} was interrupted; run the same fit command again to go on with it"
    return f"{folder} is no run folder; make one: onceover fit --store FILE.h5 --run {folder}"


def store_of(folder: Path, provenance: dict[str, Any]) -> Path:
    """The store that the run in ``folder`` was fitted on.

    Raises:
        ConfigError: it is no longer there.
    """
    store = named_store(provenance["store"])
    if not store_exists(store):
        raise ConfigError(f"{folder} was fitted on {store}, which is not there; name it: --store FILE.h5")
    return store
