"""The images of hits: the files they were made from, where these are still there, and else their thumbnails."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from PIL import Image

from onceover.base.addresses import is_address, path_of
from onceover.base.errors import OnceoverError
from onceover.base.files import read_bytes
from onceover.base.formats import EMBEDDINGS
from onceover.base.progress import LOGGER, warn
from onceover.configs.schema import ConfigError
from onceover.extract.image_source import ImageSource
from onceover.extract.layouts import stored_images
from onceover.extract.pictures import MAX_BYTES, PictureError, decode
from onceover.extract.store import FeatureStore
from onceover.heads.provenance import store_of
from onceover.heads.searching import Collection
from onceover.retrieval.embeddings import read_embeddings
from onceover.retrieval.gallery import Gallery
from onceover.retrieval.index import Index
from onceover.retrieval.search import Hit

Value = TypeVar("Value")


class Originals:
    """Finds the image files of one gallery's hits, also where their folder has moved.

    Args:
        collection: what is searched. kind: of the gallery, ``image`` or ``text``.
        roots: folders that the images may have moved to, tried in their order.

    Attributes:
        folders: those that were indexed; none where a run's own images are searched.

    Raises:
        ConfigError: one of ``roots`` is no folder.
    """

    def __init__(self, collection: Collection, kind: str, roots: Sequence[str | Path] = ()):
        self._run = collection.run
        self._gallery = collection.galleries[kind]
        self._roots = [Path(root) for root in roots]
        self.folders: list[str] = []
        self._is_told = False
        if isinstance(self._gallery, Index):
            self.folders = self._gallery.folders
        for root in self._roots:
            if not root.is_dir():
                raise ConfigError(f"--root names the folder that the images are in now; {root} is no folder")

    def placed(self, hit: Hit) -> Hit:
        """A hit with the path of its image's file: as it is where the file is there, else below one of ``roots``.

        A file below these is taken only if its bytes are those that were encoded.
        """
        folder = self._folder_of(hit.path)
        if not hit.path or (_is_absolute(hit.path) and (folder is None or Path(hit.path).is_file())):
            return hit
        relative = hit.path if folder is None else hit.path[len(folder) + 1 :]
        for root in self._roots:
            file = root / relative
            if file.is_file() and self._is_encoded(hit, self._read(str(file))):
                return replace(hit, path=str(file))
        return hit

    def missing(self, hits: Iterable[Hit]) -> list[Hit]:
        """The hits whose file on this machine is not there.

        Of a run's own images these are all or none: those of a dataset that is not where it was.
        """
        missing = []
        for hit in hits:
            is_there = Path(hit.path).is_file() if _is_absolute(hit.path) else self._has_dataset
            if hit.path and not is_address(hit.path) and not is_there:
                missing.append(hit)
        return missing

    def origin(self, hit: Hit) -> str:
        """The folder or dataset that a hit's image lay in when it was encoded."""
        if _is_absolute(hit.path):
            return self._folder_of(hit.path) or str(Path(hit.path).parent)
        return str(self._dataset)

    def _folder_of(self, path: str) -> str | None:
        """The indexed folder that a path lies in, without a slash at its end; None where it lies in none."""
        folders = [folder.rstrip("/") for folder in self.folders]
        inside = [folder for folder in folders if path.startswith(f"{folder}/")]
        return inside[0] if inside else None

    def image(self, hit: Hit, longest: int) -> Image.Image | None:
        """A hit's image, its longer side at most so many pixels: of its file, or else its thumbnail; or None.

        A file with other bytes than those that were encoded is not shown.
        """
        data = self._read(hit.path)
        if data is not None and not self._is_encoded(hit, data):
            data = None
            if not self._is_told:
                warn(f"{hit.path} is not the image that was encoded; what was kept of that one is shown")
                self._is_told = True
        for candidate in (data, self._thumbnail(hit)):
            if candidate:
                try:
                    image = decode(candidate, longest)
                except (PictureError, MemoryError) as error:
                    LOGGER.debug("%s is not shown: %s", hit.path, error)
                    continue
                image.thumbnail((longest, longest))
                return image
        return None

    def _read(self, path: str) -> bytes | None:
        """The bytes of an image file; None where it is not there or cannot be read."""
        if not path:
            return None
        try:
            if _is_absolute(path) or is_address(path):
                return read_bytes(path, MAX_BYTES)
            return self._source.open(path) if self._source is not None else None
        except (OnceoverError, OSError) as error:
            LOGGER.debug("no original: %s", error)
            return None

    @cached_property
    def _source(self) -> ImageSource | None:
        """The source of the images that the run was fitted on; None where its store or dataset is gone."""
        return self._of_store(stored_images, "thumbnails are shown")

    @cached_property
    def _dataset(self) -> Path | None:
        """Where the dataset was that the run was fitted on; None where the run's store is gone."""
        return self._of_store(_dataset_of, "the dataset's place is not known")

    def _of_store(self, read: Callable[[FeatureStore], Value], consequence: str) -> Value | None:
        """Reads from the run's store by ``read``; None, with a debug line, where the store or dataset is gone."""
        try:
            with FeatureStore(store_of(self._run.folder, self._run.provenance)) as store:
                return read(store)
        except (OnceoverError, OSError) as error:
            LOGGER.debug("%s: %s", consequence, error)
            return None

    @cached_property
    def _has_dataset(self) -> bool:
        """Whether the run's dataset is still there, as far as that can be told on this machine."""
        return self._dataset is None or is_address(self._dataset) or self._dataset.exists()

    def _is_encoded(self, hit: Hit, data: bytes | None) -> bool:
        """Whether bytes are those of the image of a hit that was encoded."""
        if data is None:
            return False
        row = self._row_of(hit)
        return row is not None and hashlib.sha256(data).hexdigest() == self._images.contents_of([row])[0]

    def _thumbnail(self, hit: Hit) -> bytes | None:
        """The thumbnail of a hit's image, if there is one."""
        row = self._row_of(hit)
        return None if row is None else self._images.thumbnail(row)

    def _row_of(self, hit: Hit) -> int | None:
        """The row, among the images, of the one that a hit is, or that it is a caption of."""
        if self._gallery.kind == "image":
            return self._gallery.row_of(hit.id)
        return self._row_by_path.get(hit.path)

    @cached_property
    def _images(self) -> Gallery | Index:
        """The images that hits are, or that they are captions of: these are the run's own."""
        if self._gallery.kind == "image":
            return self._gallery
        return read_embeddings(self._run.folder / EMBEDDINGS).gallery("image", rerank="none")

    @cached_property
    def _row_by_path(self) -> dict[str, int]:
        try:
            images = self._images
        except OnceoverError as error:
            LOGGER.debug("no images of the captions: %s", error)
            return {}
        assert isinstance(images, Gallery), "captions with images are the run's own"
        return {path: row for row, path in enumerate(images.paths)}


def _dataset_of(store: FeatureStore) -> Path:
    return path_of(store.provenance.get("named", store.provenance["data"]))


def _is_absolute(path: str) -> bool:
    return os.path.isabs(path)  # noqa: PTH117 (paths are strings here)
