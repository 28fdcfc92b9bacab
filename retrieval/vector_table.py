"""Tables of images or captions with their vectors, as Parquet files that other programs open.

docs/guide.md lists the columns. The file is written a row group at a time, so that memory does not grow with its rows.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onceover import __version__
from onceover.base.errors import OnceoverError
from onceover.base.files import check_disk, check_regular, forgiving
from onceover.base.formats import VECTORS_FORMAT
from onceover.base.outputs import Outputs
from onceover.base.progress import ProgressBar
from onceover.extract.dataset.parquet import load_pyarrow
from onceover.retrieval.gallery import Gallery

SUFFIX = ".parquet"
GROUP_ROWS = 8192  # of a row group, at most
BLOCK_ROWS = 8192  # whose neighbours are searched for together
GROUP_BYTES = 32 * 2**20  # of the images in a row group, about
_MEND = "name another file"
_IMAGE = {"info": {"features": {"image": {"_type": "Image"}}}}  # by which Hugging Face's datasets decode the column


class TableError(OnceoverError):
    """A table of vectors that cannot be written."""


@dataclass(frozen=True)
class VectorTable:
    """Images, or captions, in one space, to be written as a row each.

    Attributes:
        gallery: the items, without biases.
        texts: further columns of text by name (``split``, ``image_id``), a value for each item.
        points: float32 (N, 2), the coordinates of each item on a map.
        neighbours: how many of the nearest other items stand in each row; 0 leaves these columns out.
        images: the bytes of each item's image, in their order, read as they are written; None leaves the column out.
        about: what the vectors were made with and how to read the table, as plain values.
    """

    gallery: Gallery
    texts: dict[str, list[str]]
    points: np.ndarray
    neighbours: int
    images: Iterator[bytes] | None
    about: dict[str, Any]


def check_table(path: Path) -> None:
    """Refuses a file that a table cannot be written to, before anything is computed.

    Raises:
        TableError: it is not named as a Parquet file. FileError: a folder, or another thing that is no file.
        OutputError: a file that this program did not write, or that was changed since.
        MissingPackageError: pyarrow is not installed.
    """
    if path.suffix.lower() != SUFFIX:
        raise TableError(f"{path} is no name of a Parquet file; name one that ends in {SUFFIX}")
    if path.parent.exists() and not path.parent.is_dir():
        raise TableError(f"{path.parent} is no folder; name a file in one")
    check_regular(path)
    load_pyarrow()
    Outputs(path.parent, _MEND).check(path.name)


def write_table(path: Path, table: VectorTable) -> None:
    """Writes a table to a file, whole or not at all.

    Raises:
        OutputError: a file is there that this program did not write, or that was changed since.
        OSError: a full disk; the table that was there is still there.
    """
    check_disk(path, table.gallery.vectors.nbytes)
    outputs = Outputs(path.parent, _MEND)
    with outputs.writing([path.name]), outputs.file(path.name) as aside:
        _write(aside, table)


def _write(file: Path, table: VectorTable) -> None:
    pa = load_pyarrow()
    schema = _schema(table)
    repeating = [name for name in ("split", "image_id") if name in table.texts]
    options = {"compression": "zstd", "use_dictionary": repeating, "write_statistics": ["id", *repeating]}
    with (
        forgiving(file) as raw,
        pa.parquet.ParquetWriter(raw, schema, **options) as writer,
        ProgressBar("writing", "rows", total=len(table.gallery)) as bar,
    ):
        nearest = _nearest(table)
        for rows, images in _groups(table):
            columns = _columns(table, rows, images)
            if table.neighbours:
                columns |= _neighbours(table.gallery, list(islice(nearest, rows.stop - rows.start)))
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=GROUP_ROWS)
            raw.check()
            bar.update(rows.stop - rows.start)


def _schema(table: VectorTable) -> Any:
    """The columns of a table, with what it was made of as metadata."""
    pa = load_pyarrow()
    text = pa.string()
    types = dict.fromkeys(("id", *_text_columns(table)), text)
    if table.gallery.kind == "image" and any(table.gallery.captions):
        types |= {"caption": text, "captions": pa.list_(text)}
    types["embedding"] = pa.list_(pa.float32(), table.gallery.vectors.shape[1])
    if table.images is not None:
        types["image"] = pa.struct([("bytes", pa.binary()), ("path", text)])
    types |= {"x": pa.float32(), "y": pa.float32()}
    if table.neighbours:
        nearest = [("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))]
        types["neighbours"] = pa.struct(nearest)
        types |= {"neighbour_ids": pa.list_(text), "neighbour_scores": pa.list_(pa.float32())}
    about = {"format": VECTORS_FORMAT, "version": __version__, "kind": table.gallery.kind} | table.about
    metadata = {"onceover": json.dumps(about, sort_keys=True, ensure_ascii=False)}
    if table.images is not None:
        metadata["huggingface"] = json.dumps(_IMAGE)
    return pa.schema(list(types.items()), metadata)


def _text_columns(table: VectorTable) -> list[str]:
    """The names of the columns of text, but for the id and an image's captions."""
    names = list(table.texts)
    if any(table.gallery.paths):
        names.insert(0, "path")
    if table.gallery.kind == "text":
        names.append("caption")
    return names


def _groups(table: VectorTable) -> Iterator[tuple[slice, list[bytes]]]:
    """The rows of each row group, with the bytes of their images where these are written."""
    count = len(table.gallery)
    if table.images is None:
        for start in range(0, count, GROUP_ROWS):
            yield slice(start, min(start + GROUP_ROWS, count)), []
        return
    images: list[bytes] = []
    size = 0
    for end, image in enumerate(table.images, 1):
        images.append(image)
        size += len(image)
        if end == count or len(images) == GROUP_ROWS or size >= GROUP_BYTES:
            yield slice(end - len(images), end), images
            images = []
            size = 0


def _columns(table: VectorTable, rows: slice, images: list[bytes]) -> dict[str, Any]:
    """The values of some rows by their column; some that the schema lacks may be among them."""
    gallery = table.gallery
    captions = gallery.captions[rows]
    columns: dict[str, Any] = {name: values[rows] for name, values in table.texts.items()}
    columns |= {
        "id": gallery.ids[rows],
        "path": gallery.paths[rows],
        "captions": captions,
        "caption": [texts[0] if texts else None for texts in captions],
        "embedding": _vectors(gallery.vectors[rows]),
        "x": table.points[rows, 0],
        "y": table.points[rows, 1],
    }
    if table.images is not None:
        named = zip(images, gallery.paths[rows], strict=True)
        columns["image"] = [{"bytes": image, "path": path} for image, path in named]
    return columns


def _vectors(vectors: np.ndarray) -> Any:
    """Vectors (N, D) as a column of lists of D numbers each."""
    pa = load_pyarrow()
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def _nearest(table: VectorTable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each item the scores and rows of its nearest others, best first.

    They are searched for in blocks of one size, since scores differ in their last digits by the size of a block.
    """
    count = len(table.gallery)
    for start in range(0, count, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, count))
        yield from zip(*nearest_others(table.gallery.vectors, rows, table.neighbours), strict=True)


def _neighbours(gallery: Gallery, nearest: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, list]:
    """The columns that name the nearest other items of some rows, best first, from their scores and rows."""
    columns: dict[str, list] = {"neighbours": [], "neighbour_ids": [], "neighbour_scores": []}
    named = np.unique([rows for _, rows in nearest]).tolist()
    name_of = {row: gallery.ids[row] for row in named}  # in their order, in which a long column is read fastest
    for scores, rows in nearest:
        columns["neighbours"].append({"ids": rows.tolist(), "distances": np.maximum(1 - scores, 0).tolist()})
        columns["neighbour_ids"].append([name_of[row] for row in rows.tolist()])
        columns["neighbour_scores"].append(scores.tolist())
    return columns


def nearest_others(vectors: np.ndarray, rows: slice, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other vectors of some of the vectors, best first; all others where ``count`` is larger.

    Args:
        vectors: float32 (N, D), of length 1. rows: those that are asked for, Q of them.

    Returns:
        Cosine similarities float32 (Q, count) and rows int64 (Q, count).
    """
    from onceover.retrieval.exact import exact_search

    count = min(count, len(vectors) - 1)
    scores, nearest = exact_search(vectors, vectors[rows], count + 1)
    is_other = nearest != np.arange(rows.start, rows.stop)[:, None]
    is_other[is_other.all(1), -1] = False  # so many equal ones that a row is not among its own nearest
    shape = (len(nearest), count)
    return scores[is_other].reshape(shape), nearest[is_other].reshape(shape)
