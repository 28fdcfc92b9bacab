"""What files hold, so that results can be compared: values, not the bytes of containers or the time of day."""

import csv
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import h5py
import numpy as np

#: files of a command under way, which it may write, keep and remove, and the record of what it wrote
WORKING = (".lock", ".part", "resume.pt", ".onceover.json")
LEFTOVER_PATTERNS = (".*.aside*", ".unpack-*", ".*.old*", ".*.new*")
VOLATILE = {"seconds", "created", "rows_per_second", "queries_per_second", "learning_seconds", "store", "run", "data"}


class Snapshot:
    """The regular files below a folder with a digest of each, links and special files with what they are."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = digests(folder)

    def changes(self, outputs: tuple[Path, ...] = ()) -> str:
        """The files that are gone or altered, but for those in ``outputs`` and those of work under way."""
        after = digests(self.folder)
        named = []
        for path, digest in self.files.items():
            if is_working(path) or any(path == output or output in path.parents for output in outputs):
                continue
            if after.get(path) != digest:
                named.append(f"{'altered' if path in after else 'gone'}: {path.relative_to(self.folder)}")
        return ", ".join(named[:5])


def is_working(path: Path) -> bool:
    """Whether a file belongs to work under way."""
    return path.name.endswith(WORKING) or any(parent.name.endswith(".parts") for parent in path.parents)


def digests(folder: Path) -> dict[Path, str]:
    """A digest of each file below a folder."""
    result = {}
    for name, _, files in os.walk(folder):
        for file in files:
            path = Path(name) / file
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size < 2**28:
                result[path] = hashlib.blake2b(path.read_bytes()).hexdigest()
            else:
                result[path] = f"{status.st_mode} {status.st_size}"
    return result


def leftovers(folder: Path) -> list[str]:
    """Files and folders that a command writes beside its result and has to remove."""
    matches = []
    for pattern in LEFTOVER_PATTERNS:
        matches += folder.rglob(pattern)
    return sorted({str(path.relative_to(folder)) for path in matches})


def store_values(path: Path) -> dict[str, bytes]:
    """Every dataset of an HDF5 file with a digest of its type, shape and values."""
    values = {}

    def visit(name: str, item) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        content = item[()]
        if item.dtype.hasobject:
            parts = [part if isinstance(part, bytes) else np.asarray(part).tobytes() for part in np.ravel(content)]
            content = repr(parts).encode()
        else:
            content = np.asarray(content).tobytes()
        values[name] = hashlib.blake2b(f"{item.dtype.kind} {item.shape}".encode() + content).digest()

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(visit)
    return values


def store_of_extraction(path: Path) -> dict:
    """A feature store's values, with its ledger as names and stages: reasons may differ in words."""
    values = store_values(path)
    return {name: value for name, value in values.items() if not name.endswith("/reason")}


def run_values(folder: Path) -> dict:
    """A run's heads and embeddings, as a command reads them: where a run is being replaced, it ends that first."""
    from onceover.heads.replacement import end_interrupted_swap, is_swapping

    if is_swapping(folder):
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            copy = Path(place) / folder.name
            shutil.copytree(folder, copy)
            end_interrupted_swap(copy)
            return run_values(copy)
    values = {f"embeddings {name}": value for name, value in store_values(folder / "embeddings.h5").items()}
    values["heads"] = hashlib.blake2b((folder / "heads.safetensors").read_bytes()).digest()
    return values | {"finished": (folder / "run.json").exists()}


def tuned_values(folder: Path) -> dict:
    """A fine-tuned run: the heads, the encoders, and what was measured."""
    values: dict = {}
    for path in sorted(folder.rglob("*.safetensors")):
        values[str(path.relative_to(folder))] = hashlib.blake2b(path.read_bytes()).digest()
    told = json.loads((folder / "finetune.json").read_text())
    for name in ("files", "sha256"):  # of files that hold times
        told.pop(name, None)
    return values | {"finetune.json": json.dumps(without_times(told), sort_keys=True)}


def sweep_values(folder: Path) -> dict:
    """A sweep's table without the seconds, and its best setting."""
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return {"results.csv": json.dumps(table), "best.yaml": (folder / "best.yaml").read_text()}


def index_values(folder: Path) -> dict:
    """Both galleries of an index: each item with its vector and content, in whatever segments they lie."""
    from onceover.retrieval.index import Index

    values = {}
    for gallery in ("images", "captions"):
        if not (folder / gallery / "CURRENT").exists():
            continue
        index = Index(folder / gallery)
        vectors = np.concatenate([block for segment in index.segments for block in segment.vectors()])
        for name, content, vector in zip(index.ids(), index.living("content"), vectors, strict=True):
            values[f"{gallery} {name}"] = hashlib.blake2b(vector.tobytes() + content.encode()).digest()
        for number in np.flatnonzero(np.concatenate([segment.alive for segment in index.segments])):
            item = index.item(int(number))
            values[f"{gallery} {item['id']} shown"] = repr(item)
    for path in sorted(path for path in folder.glob("*.h5") if not path.name.startswith(".")):
        values |= {f"{path.name} {name}": value for name, value in store_of_extraction(path).items()}
    return values


def archive_values(folder: Path) -> dict:
    """What was unpacked, by the archive that it came from: each is whole by itself."""
    return {f"{name.partition('/')[0]} {name}": value for name, value in folder_values(folder).items()}


def folder_values(folder: Path) -> dict:
    """Every visible file below a folder with its bytes."""
    files = digests(folder)
    return {str(path.relative_to(folder)): value for path, value in files.items() if not path.name.startswith(".")}


def evaluation_values(file: Path) -> dict:
    """The numbers of an evaluation, and of the tables beside it."""
    values = {}
    for path in sorted(file.parent.glob(f"{file.stem}.*")):
        if path.suffix == ".json":
            values[path.name] = json.dumps(without_times(json.loads(path.read_text())), sort_keys=True)
        else:
            values[path.name] = path.read_text()
    return values


def figure_names(folder: Path) -> dict:
    """The figures of a folder; each must be whole."""
    figures = [path for path in sorted(folder.rglob("*.[ps][nv]g")) if not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.stat().st_size > 500 for path in figures}


def without_times(value):
    """A JSON value without what depends on the time of day or on where files lie."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return value


def json_lines(text: str) -> list:
    """What a command has printed as JSON, one value a line or one value altogether."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in io.StringIO(text) if line.strip()]


def difference(clean: dict, other: dict) -> str:
    """The names of what differs between two contents."""
    named = [f"{name} differs" for name in clean if name in other and clean[name] != other[name]]
    named += [f"{name} is missing" for name in clean if name not in other]
    named += [f"{name} is new" for name in other if name not in clean]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
