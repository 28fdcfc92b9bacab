"""Features computed elsewhere -> feature store: arrays and a caption table, checked as an extraction's features are.

Memory stays at a block of rows: the arrays are read twice, once to check and hash them, once to copy them.
"""

import hashlib
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np

from onceover.base.errors import OnceoverError
from onceover.base.files import check_disk, digest, only_writer
from onceover.base.progress import say
from onceover.configs.schema import ExtractConfig
from onceover.extract.arrays import Array, files_of, open_array, parquet_rows
from onceover.extract.dataset import Dataset
from onceover.extract.dataset.caption_table import SUFFIXES, open_table
from onceover.extract.dataset.reading import DEFAULT, ReadOptions
from onceover.extract.dataset.table import captioned, read_ids
from onceover.extract.store import FeatureStore, StoreError, dataset_fingerprint, seal
from onceover.extract.summary import Summary, summary_of

# random directions, and the share of a row's length by which equal rows may differ
_PROJECTIONS = 8
_SAME = 0.01
_MAX_VIEWS = 12  # of an image; an extraction makes no more
_OTHER_COLUMNS = 512  # bytes a row, about


class ImportingError(OnceoverError):
    """Features and captions that do not belong together."""


class Features:
    """The rows of an array that are for the store, as what ``seal`` copies them from.

    Attributes:
        row: the shape of a row: (V, D) of an image, (D,) of a caption.
        sha256: of the rows' bytes; contents: of each image's row, by its name; zeros: rows that are zeros alone.
    """

    def __init__(self, kind: str, array: Array, chosen: np.ndarray, owners: list[str] | None = None):
        """Reads everything once. ``chosen``: rows, ascending. ``owners``: the image of each row of the array.

        Raises:
            ArrayError: numbers that are not finite. ImportingError: rows of one image that differ.
        """
        self.kind = kind
        self.array = array
        self.row = (1, *array.shape[1:]) if kind == "image" and len(array.shape) == 2 else array.shape[1:]
        self.nbytes = len(chosen) * int(np.prod(self.row)) * np.dtype(array.dtype).itemsize
        self._kept = np.zeros(len(array), bool)
        self._kept[chosen] = True
        self._sketches: dict[str, np.ndarray] = {}
        self.contents: dict[str, str] = {}
        self.zeros = 0
        state = hashlib.sha256()
        for rows, block in array.blocks(f"checking {kind}"):
            kept = block[self._kept[rows]]
            state.update(kept.data)
            self.zeros += int((~kept.any(axis=tuple(range(1, kept.ndim)))).sum())
            if owners is not None:
                self._add_contents(owners[rows], block)
        self.sha256 = state.hexdigest()

    def _add_contents(self, owners: list[str], block: np.ndarray) -> None:
        """Notes each image's content; its other rows may differ by the rounding of an encoder's batches.

        They are compared by a few random projections, so that no row has to be kept.
        """
        rows = block.reshape(len(block), -1).astype(np.float32)
        directions = np.random.default_rng(0).standard_normal((rows.shape[1], _PROJECTIONS), np.float32)
        sketches = rows @ directions
        norms = np.linalg.norm(rows, axis=1)
        for name, values, sketch, norm in zip(owners, block, sketches, norms, strict=True):
            if not name:
                continue
            self.contents.setdefault(name, hashlib.sha256(values).hexdigest())
            if np.abs(self._sketches.setdefault(name, sketch) - sketch).max() > _SAME * norm:
                raise ImportingError(
                    f"{self.array.source}: rows of the image {name} differ; give one row for each different image"
                )

    def copy(self, keys: list[str], group: h5py.Group) -> None:
        """Writes the rows, one for each of ``keys``, as the datasets that a store has for them."""
        target = group.create_dataset("features", (len(keys), *self.row), dtype=self.array.dtype)
        end = 0
        for rows, block in self.array.blocks(f"writing {self.kind}"):
            kept = block[self._kept[rows]]
            target[end : end + len(kept)] = kept.reshape(len(kept), *self.row)
            end += len(kept)
        if self.kind == "text":
            group["truncated"] = np.zeros(len(keys), bool)


def import_features(
    image_features: Path,
    text_features: Path,
    captions: Path,
    path: Path,
    *,
    image_ids: Path | None = None,
    name: str | None = None,
    data: Path | None = None,
    seed: int = 0,
    force: bool = False,
    reading: ReadOptions = DEFAULT,
) -> Summary:
    """Writes the store ``path``. Row i of the text features belongs to row i of the caption table.

    The image features have a row for each different image of the table, in the order of their first appearance, or
    one for each row of the table, or one for each line of ``image_ids``.

    Args:
        name: what to call the unknown encoders; as the file or folder of image features by default.
        data: where the images' names lead from; the table's folder by default. No image is looked for.
        seed: of the split, where the table has none.
        force: replace a store of other features, images or captions.
        reading: the caption table's columns, where they have other names than the usual ones.

    Raises:
        ArrayError, DatasetError: files that cannot be read or used. ImportingError: they do not belong together.
        StoreError: another store is there. FileError: no room, or another process is writing.
    """
    start = time.monotonic()
    path = Path(path)
    image_array = open_array(image_features, (2, 3))
    text_array = open_array(text_features, (2,))
    _check_views(image_array)
    rows = read_rows(captions, reading)
    if len(text_array) != len(rows):
        raise ImportingError(
            f"{text_features} has {len(text_array):,} rows, and {captions} has {len(rows):,}; each caption has one"
        )
    ids = read_ids(image_ids) if image_ids else None
    owners = _owners(image_array, [row[0].strip() for row in rows], captions, ids, image_ids)
    dataset, of_captions = captioned(rows, captions, data or captions.absolute().parent, ids, seed)
    first = dict(zip(reversed(owners), reversed(range(len(owners))), strict=True))
    say(f"importing features of {len(dataset.ids):,} images and {len(dataset.captions):,} captions")
    images = Features("image", image_array, np.array([first[name] for name in dataset.ids]), owners)
    texts = Features("text", text_array, of_captions)
    if images.zeros or texts.zeros:
        zeros = f"features that are zeros alone: {images.zeros:,} images, {texts.zeros:,} captions"
        dataset.notes.append(f"{zeros}; evaluate refuses a split with such, since they have no direction")
    for note in dataset.notes:
        say(note)
    up_to_date = _write(path, dataset, images, texts, name or image_features.stem, seed, force)
    with FeatureStore(path) as store:
        summary = summary_of(store, up_to_date)
    summary.seconds = time.monotonic() - start
    return summary


def _check_views(images: Array) -> None:
    """Refuses regions of images: training would draw one at random, as if it showed the whole image.

    Raises:
        ImportingError: more rows an image than an image has views.
    """
    if len(images.shape) == 3 and images.shape[1] > _MAX_VIEWS:
        raise ImportingError(
            f"{images.source} has {images.shape[1]} rows per image, more than the {_MAX_VIEWS} views that there are; "
            "pool the regions of an image first: features.mean(axis=1)"
        )


def read_rows(captions: Path, reading: ReadOptions = DEFAULT) -> list[tuple[str, str, str]]:
    """(image, caption, split) of each row of a caption table: a text file, a ``.parquet`` file, or a folder of these.

    Raises:
        ArrayError, DatasetError: not there, not readable, or without the columns.
        ImportingError: columns of a Parquet file that the user names.
    """
    files = files_of(captions, (".parquet",) if captions.is_dir() else (*SUFFIXES, ".parquet"))
    rows: list[tuple[str, str, str]] = []
    for file in files:
        if file.suffix != ".parquet":
            rows.extend(open_table(file, reading).rows())
        elif reading == DEFAULT:
            rows.extend(parquet_rows(file))
        else:
            raise ImportingError(
                f"{file}: columns are named in text tables alone; rename them to image (or image_path), caption, split"
            )
    return rows


def _owners(images: Array, names: list[str], table: Path, ids: list[str] | None, image_ids: Path | None) -> list[str]:
    """The name of the image of each row of image features."""
    if ids is not None:
        if len(ids) != len(images):
            raise ImportingError(f"{images.source} has {len(images):,} rows, and {image_ids} has {len(ids):,} ids")
        return ids
    different = list(dict.fromkeys(filter(None, names)))
    for owners in (different, names):
        if len(owners) == len(images):
            return owners
    raise ImportingError(
        f"{images.source} has {len(images):,} rows, and {table} has {len(names):,} rows with {len(different):,} "
        "different images; give a row for each of these or those, or say which images they are with --image-ids"
    )


def _write(path: Path, dataset: Dataset, images: Features, texts: Features, name: str, seed: int, force: bool) -> bool:
    """Writes the store, unless it is there already, which is then said."""
    columns = {"id": dataset.ids, "path": dataset.paths, "split": dataset.splits}
    columns["sha256"] = [images.contents[name] for name in dataset.ids]
    recipes = {"image": _recipe(name, images), "text": _recipe(name, texts)}
    content = dataset_fingerprint(dataset.ids, columns["sha256"], dataset.splits, dataset.captions, dataset.image_index)
    with only_writer(path, "the store"):
        if path.exists():
            with FeatureStore(path) as old:
                if old.fingerprints == {kind: digest(recipe) for kind, recipe in recipes.items()} | {
                    "dataset": content
                }:
                    return True
            if not force:
                raise StoreError(f"{path} holds other features or captions; name another --store, or use --force")
        others = _OTHER_COLUMNS * (len(dataset.ids) + len(dataset.captions))
        check_disk(path, images.nbytes + texts.nbytes + others)
        unknown = np.full(len(dataset.ids), -1, np.int64)
        seal(
            path,
            images={**columns, "size": unknown, "mtime_ns": unknown},
            texts={"caption": dataset.captions, "image_index": dataset.image_index},
            sources={"image": images, "text": texts},
            recipes=recipes,
            provenance=_provenance(dataset, images, texts, name, seed),
            failures=dataset.failures,
            tokenizer_files={},
        )
    return False


def _recipe(name: str, features: Features) -> dict:
    """The recipe of imported features: of the encoder nothing is known but the name it was given."""
    return {
        "architecture": "imported",
        "name": name,
        "features": features.sha256,
        "shape": list(features.row),
        "dtype": features.array.dtype,
        "store_dtype": features.array.dtype,
        "weights": "unknown",
        "pooling": "unknown",
    }


def _provenance(dataset: Dataset, images: Features, texts: Features, name: str, seed: int) -> dict:
    """The provenance of an imported store, under the keys of an extraction's."""
    encoder = f"import:{name}"
    config = ExtractConfig(image_encoder=encoder, text_encoder=encoder, thumbnails=False, seed=seed)
    made = {"encoder": encoder, "seed": seed, "python": platform.python_version()}
    made |= {library: version(library) for library in ("numpy", "h5py")}
    return {
        **dataset.provenance(),
        "settings": asdict(config) | {"views": images.row[0]},
        "listing": None,  # no extraction finds its own here
        "request": None,
        "image": made | {"source": str(images.array.source.resolve())},
        "text": made | {"source": str(texts.array.source.resolve())},
    }
