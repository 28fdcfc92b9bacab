"""Features of rows that a dataset has no more, kept as shards beside the store (``FILE.h5.kept``) for their return."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import digest, remove_files
from onceover.base.progress import warn
from onceover.extract.shards import RowSources, describe_shard, kept_folder, shard_files, write_shard
from onceover.extract.store import KEYS, StoreError

_ROWS = {"image": 128, "text": 1024}  # of a shard


def check_kept(path: Path) -> None:
    """Refuses a link in the place of the folder beside the store at ``path``, since files in it are removed later.

    Raises:
        StoreError: it is one.
    """
    folder = kept_folder(path)
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link, and an extraction keeps features there; move it elsewhere")


def keep_vanished(path: Path, sources: RowSources, present: np.ndarray, recipe: dict) -> frozenset[str]:
    """Writes the rows of earlier stores that are not ``present`` into shards beside the store.

    Args:
        present: positions among ``sources``, int64.

    Returns:
        The names of the shards.
    """
    vanished = np.setdiff1d(sources.positions(), present)
    size = _ROWS[sources.kind]
    names = set()
    if len(vanished):
        kept_folder(path).mkdir(exist_ok=True)
    for number, start in enumerate(range(0, len(vanished), size)):
        positions = vanished[start : start + size]
        keys = _column(sources, KEYS[sources.kind], positions)
        name = f"{sources.kind}-{digest(keys)[:12]}-{number:05d}.h5"
        names.add(name)
        if not (kept_folder(path) / name).exists():
            write_shard(kept_folder(path) / name, sources.kind, _columns(sources, positions, keys), recipe, [])
    return frozenset(names)


def _column(sources: RowSources, name: str, positions: np.ndarray) -> list[Any]:
    """A column of some rows."""
    values: list[Any] = sources.gather([name], positions)[name].tolist()
    return values


def _columns(sources: RowSources, positions: np.ndarray, keys: list[str]) -> dict:
    """The columns of a shard with some of the rows, which have the keys."""
    columns: dict = sources.gather(sources.copied, positions)
    if "thumbnail" in columns:
        columns["thumbnail"] = [value.tobytes() for value in columns["thumbnail"]]
    columns[KEYS[sources.kind]] = keys
    if sources.kind == "image":
        columns["id"] = _column(sources, "id", positions)
        columns |= sources.gather(["size", "mtime_ns"], positions)
    return columns


def kept_shards(path: Path, kind: str = "") -> dict[Path, tuple[str, str]]:
    """The shards that are kept beside the store at ``path``, of one kind or of both, with kind and fingerprint of each.

    One that cannot be read is left alone, and told.
    """
    shards = {}
    for shard in shard_files(kept_folder(path), kind):
        try:
            of_kind, fingerprint, _ = describe_shard(shard)
            shards[shard] = (of_kind, fingerprint)
        except OnceoverError as error:
            warn(f"features that were kept are left alone: {error}")
    return shards


def remove_kept(path: Path, fingerprints: Mapping[str, str] | None = None, but: frozenset[str] = frozenset()) -> None:
    """Removes features that were kept of rows that had vanished.

    Args:
        fingerprints: by kind; only features of these are removed, and by default all. but: files that stay.
    """
    names = []
    for shard, (kind, fingerprint) in kept_shards(path).items():
        is_meant = fingerprints is None or fingerprint == fingerprints.get(kind)
        if is_meant and shard.name not in but:
            names.append(shard.name)
    remove_files(kept_folder(path), names)
