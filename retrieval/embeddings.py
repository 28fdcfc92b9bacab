"""Reads an embeddings file (docs/store-format.md) and checks that it is what it must be."""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from configs import OnceoverError
from configs.formats import EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION, UNIT_NORM_TOLERANCE


class EmbeddingsError(OnceoverError):
    """An embeddings file that is missing, damaged or not normalised."""


@dataclass(frozen=True)
class Embeddings:
    """N pictures and M captions in one space, as unit vectors.

    Attributes:
        images, texts: float32 (N, D), (M, D). image_index: int64 (M,), each caption's picture.
        ids, paths, splits: lists of N; thumbnails: list of N JPEGs, or None. captions: list of M.
        fingerprints: of the image features, the text features and the dataset behind it.
        selection_split, report_split: what the heads were chosen by, and what they are to be reported on.
    """

    images: np.ndarray
    texts: np.ndarray
    image_index: np.ndarray
    ids: list[str]
    paths: list[str]
    splits: list[str]
    captions: list[str]
    thumbnails: list[bytes] | None
    fingerprints: dict[str, str]
    selection_split: str
    report_split: str

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the pictures of a split, rows of their captions, and the caption map counted among those pictures.

        Raises:
            EmbeddingsError: no such split, or one without captions.
        """
        pictures = np.flatnonzero(np.array(self.splits) == name)
        captions = np.flatnonzero(np.isin(self.image_index, pictures))
        if not len(pictures) or not len(captions):
            known = ", ".join(sorted({split for split in self.splits if split}))
            raise EmbeddingsError(f"the run has no pictures in the split {name!r}; its splits: {known}")
        return pictures, captions, np.searchsorted(pictures, self.image_index[captions])


def read_embeddings(path: str | Path) -> Embeddings:
    """Reads and checks an embeddings file.

    Raises:
        EmbeddingsError: missing, not of this format, rows that are not finite unit vectors, a map that points outside.
    """
    path = Path(path)
    if not path.is_file():
        raise EmbeddingsError(f"there are no embeddings at {path}; fit writes them")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if (file.attrs.get("format"), file.attrs.get("format_version")) != (EMBEDDINGS_FORMAT, EMBEDDINGS_VERSION):
                raise EmbeddingsError(f"{path} is no embeddings file of the format {EMBEDDINGS_VERSION}; fit again")
            embeddings = _read(file)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise EmbeddingsError(f"{path} is damaged ({str(error).splitlines()[0]}); fit again") from error
    for name, rows in (("image", embeddings.images), ("text", embeddings.texts)):
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(rows, axis=1) - 1) < UNIT_NORM_TOLERANCE))
        if len(bad):
            raise EmbeddingsError(f"{path}: {len(bad)} {name} embeddings are not finite unit vectors; fit again")
    index, pictures = embeddings.image_index, len(embeddings.ids)
    if len(index) and not (index.min() >= 0 and index.max() < pictures):
        raise EmbeddingsError(f"{path}: the caption map points outside the pictures; fit again")
    return embeddings


def _read(file: h5py.File) -> Embeddings:
    image, text = file["image"], file["text"]
    strings = {name: image[name].asstr()[:].tolist() for name in ("id", "path", "split")}
    return Embeddings(
        images=image["embedding"][:],
        texts=text["embedding"][:],
        image_index=text["image_index"][:],
        ids=strings["id"],
        paths=strings["path"],
        splits=strings["split"],
        captions=text["caption"].asstr()[:].tolist(),
        thumbnails=[data.tobytes() for data in image["thumbnail"][:]] if "thumbnail" in image else None,
        fingerprints={kind: file.attrs[f"{kind}_fingerprint"] for kind in ("image", "text", "dataset")},
        selection_split=file.attrs["selection_split"],
        report_split=file.attrs["report_split"],
    )
