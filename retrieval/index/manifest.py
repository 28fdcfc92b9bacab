"""The manifest of an index: the file that lists its segments, and ``CURRENT``, the pointer that names it."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeGuard

from onceover.base.files import FileError, digest, file_sha256, read_json, write_json
from onceover.base.formats import CURRENT, INDEX_FORMAT, INDEX_VERSION
from onceover.retrieval.index.types import REBUILD, TYPES, IndexingError

_SEGMENT_NAME = re.compile(r"\d{6}")
_SEGMENT_FILE = re.compile(r"\d{6}\.(faiss|h5)|\d{6}-[0-9a-f]{12}\.npy")
_MANIFEST_FILE = re.compile(r"manifest-([0-9a-f]{12})\.json")
AND = " + "  # between the folders of an index of several
_MAX_COUNT = 2**40
_MAX_EFFORT = 2**16


def read_manifest(folder: str | Path) -> dict:
    """Reads the current manifest of an index.

    Raises:
        IndexingError: no index there, of another version, or a pointer or manifest that is damaged.
    """
    folder = Path(folder)
    pointer = folder / CURRENT
    if not pointer.is_file():
        raise IndexingError(f"there is no index at {folder}; onceover index makes one")
    current = _read_json(pointer, "the index's pointer")
    if (current.get("format"), current.get("format_version")) != (INDEX_FORMAT, INDEX_VERSION):
        raise IndexingError(f"{folder} is no index of the format {INDEX_VERSION}; {REBUILD}")
    name = current.get("manifest")
    sha256 = current.get("sha256")
    if not isinstance(name, str) or not _MANIFEST_FILE.fullmatch(name) or not isinstance(sha256, str):
        raise IndexingError(f"{pointer} names no manifest: it is damaged; {REBUILD}")
    check_file(folder / name, sha256)
    manifest = _read_json(folder / name, "the index's manifest")
    problem = _problem_of(manifest)
    if problem:
        raise IndexingError(f"{folder / name} is damaged: {problem}; {REBUILD}")
    return manifest


def folders_of(manifest: dict) -> list[str]:
    """The folders whose images an index holds; of another index what its manifest names as its source.

    A manifest of an earlier version has no list of them.
    """
    if manifest.get("folders"):
        return manifest["folders"]
    source = manifest["source"]
    return source.split(AND) if AND in source and not Path(source).exists() else [source]


def manifest_name(manifest: dict) -> str:
    """The name of a manifest's file, which holds a digest of its content."""
    return f"manifest-{digest(manifest)[:12]}.json"


def current_name(folder: Path) -> str:
    """The name of the manifest that ``CURRENT`` points at."""
    return _read_json(folder / CURRENT, "the index's pointer")["manifest"]


def point_at(folder: Path, name: str) -> None:
    """Makes ``CURRENT`` point at the manifest of that name, which makes its version the current one."""
    pointer = {
        "format": INDEX_FORMAT,
        "format_version": INDEX_VERSION,
        "manifest": name,
        "sha256": file_sha256(folder / name),
    }
    write_json(folder / CURRENT, pointer)


def has_pointer(folder: Path) -> bool:
    """Whether a folder holds a readable pointer of this program's."""
    try:
        return read_json(folder / CURRENT, "the index's pointer").get("format") == INDEX_FORMAT
    except FileError:
        return False


def all_manifests(folder: Path) -> dict[str, dict]:
    """The manifests in a folder that were written by this program: their names are digests of their content."""
    manifests = {}
    for path in folder.glob("manifest-*.json"):
        name = _MANIFEST_FILE.fullmatch(path.name)
        if name is None or not path.is_file():
            continue
        try:
            manifest = read_json(path, "a manifest")
        except FileError:
            continue
        if digest(manifest)[:12] == name[1] and _problem_of(manifest) is None:
            manifests[path.name] = manifest
    return manifests


def files_of(manifest: dict) -> set[str]:
    """The names of all files of a manifest's segments."""
    names: set[str] = set()
    for entry in manifest["segments"]:
        names.update(entry["files"])
    return names


def is_index_file(name: str) -> bool:
    """Whether a name is one that this program gives to files of an index."""
    return bool(_SEGMENT_FILE.fullmatch(name) or _MANIFEST_FILE.fullmatch(name))


def check_file(path: Path, sha256: str) -> None:
    """Compares a file with the SHA-256 that a manifest or pointer has of it.

    Raises:
        IndexingError: it is missing, or its bytes are others.
    """
    try:
        actual = file_sha256(path)
    except FileNotFoundError as error:
        raise IndexingError(f"{path} is missing; {REBUILD}") from error
    if actual != sha256:
        raise IndexingError(f"{path} does not match its SHA-256: it is damaged, or not what was built; {REBUILD}")


def _read_json(path: Path, noun: str) -> dict:
    try:
        return read_json(path, noun)
    except FileError as error:
        raise IndexingError(f"{error}; {REBUILD}") from error


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_positive(value: object) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: object) -> bool:
    return (type(value) is int or type(value) is float) and math.isfinite(value)


def _is_string(value: object) -> TypeGuard[str]:
    return isinstance(value, str)


#: the fields of a manifest, and the check that each value has to pass
MANIFEST_FIELDS: dict[str, Callable[[object], bool]] = {
    "kind": lambda value: value in ("image", "text"),
    "biased": lambda value: isinstance(value, bool),
    "dim": _is_positive,
    "space": _is_string,
    "type": lambda value: value in TYPES,
    "asked": lambda value: value in (*TYPES, "auto"),
    "reason": _is_string,
    "min_recall": _is_number,
    "source": _is_string,
    "run": _is_string,
    "rows": _is_count,
    "recall@10": _is_number,
    "queries_per_second": _is_number,
    "probes": _is_count,
    "segments": lambda value: isinstance(value, list) and len(value) > 0,
}
#: the fields of a segment's entry
SEGMENT_FIELDS: dict[str, Callable[[object], bool]] = {
    "name": lambda value: _is_string(value) and _SEGMENT_NAME.fullmatch(value) is not None,
    "type": lambda value: value in TYPES,
    "effort": lambda value: _is_count(value) and value <= _MAX_EFFORT,
    "rows": _is_positive,
    "removed": lambda value: value is None or (_is_string(value) and value.endswith(".npy")),
    "files": lambda value: isinstance(value, dict),
}


def _problem_of(manifest: dict) -> str | None:
    """The first thing that is wrong with a manifest, or None."""
    problem = _field_problem(manifest, MANIFEST_FIELDS)
    folders = manifest.get("folders", [])  # which an earlier version did not write
    if not isinstance(folders, list) or not all(map(_is_string, folders)):
        return "folders is not what it has to be"
    segments = manifest.get("segments")
    if not isinstance(segments, list):
        return problem
    for entry in segments:
        problem = problem or _field_problem(entry, SEGMENT_FIELDS)
    if problem:
        return problem
    for entry in segments:
        names = {f"{entry['name']}.faiss", f"{entry['name']}.h5"}
        if entry["removed"] is not None:
            names.add(entry["removed"])
        if set(entry["files"]) != names or not all(map(_SEGMENT_FILE.fullmatch, names)):
            return f"the files of segment {entry['name']} are not those of a segment"
    return None


def _field_problem(record: object, fields: Mapping[str, Callable[[object], bool]]) -> str | None:
    """The first field of a record that is missing or fails its check, in words, or None."""
    if not isinstance(record, dict):
        return "a segment is no object"
    for key, is_right in fields.items():
        if key not in record or not is_right(record[key]):
            return f"{key} is missing, or not what it has to be"
    return None
