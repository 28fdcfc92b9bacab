"""The images of hits: the files they were made from, where these are still there, and else their thumbnails."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image

from onceover.base.addresses import is_address
from onceover.base.errors import OnceoverError
from onceover.base.files import read_bytes
from onceover.base.progress import LOGGER
from onceover.configs.schema import ConfigError
from onceover.extract.image_source import ImageSource
from onceover.extract.layouts import stored_images
from onceover.extract.pictures import MAX_BYTES, PictureError, decode
from onceover.extract.store import FeatureStore
from onceover.heads.provenance import store_of
from onceover.heads.searching import Collection
from onceover.retrieval.index import Index, folders_of
from onceover.retrieval.search import Hit


class Originals:
    """Finds the image files of one gallery's hits, also where their folder has moved.

    Args:
        collection: what is searched. kind: of the gallery, ``image`` or ``text``.
        roots: folders that the images may have moved to, tried in their order.

    Attributes:
        folders: the folders that were indexed; none where a run's own images are searched.

    Raises:
        ConfigError: one of ``roots`` is no folder.
    """

    def __init__(self, collection: Collection, kind: str, roots: Sequence[str | Path] = ()):
        self._run = collection.run
        self._gallery = collection.galleries[kind]
        self._roots = [Path(root) for root in roots]
        self.folders: list[str] = []
        if isinstance(self._gallery, Index):
            self.folders = folders_of(self._gallery.manifest)
        for root in self._roots:
            if not root.is_dir():
                raise ConfigError(f"--root names the folder that the images are in now; {root} is no folder")

    def place(self, path: str) -> str:
        """The path of an image's file: below the first of ``roots`` that has it, else as it was."""
        relative = path
        if os.path.isabs(path):  # noqa: PTH117 (paths are strings here)
            inside = [folder for folder in self.folders if path.startswith(f"{folder.rstrip('/')}/")]
            if not inside:
                return path
            relative = path[len(inside[0].rstrip("/")) + 1 :]
        for root in self._roots:
            if path and (root / relative).is_file():
                return str(root / relative)
        return path

    def missing(self, hits: Iterable[Hit]) -> list[Hit]:
        """The hits whose file, below an indexed folder of this machine, is not there."""
        return [hit for hit in hits if os.path.isabs(hit.path) and not Path(hit.path).is_file()]  # noqa: PTH117

    def image(self, hit: Hit, longest: int) -> Image.Image | None:
        """A hit's image, its longer side at most so many pixels: of its file, or else its thumbnail; or None.

        A file with other bytes than those that were encoded is shown only where there is no thumbnail.
        """
        data = self._read(hit.path)
        thumbnail, content = self._stored(hit)
        if data is not None and thumbnail and hashlib.sha256(data).hexdigest() != content:
            data = None
        for candidate in (data, thumbnail):
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
            if os.path.isabs(path) or is_address(path):  # noqa: PTH117
                return read_bytes(path, MAX_BYTES)
            return self._source.open(path) if self._source is not None else None
        except (OnceoverError, OSError) as error:
            LOGGER.debug("no original: %s", error)
            return None

    @cached_property
    def _source(self) -> ImageSource | None:
        """The source of the images that the run was fitted on; None where its store or dataset is gone."""
        try:
            with FeatureStore(store_of(self._run.folder, self._run.provenance)) as store:
                return stored_images(store)
        except (OnceoverError, OSError) as error:
            LOGGER.debug("thumbnails are shown: %s", error)
            return None

    def _stored(self, hit: Hit) -> tuple[bytes | None, str]:
        """The thumbnail of a hit, if there is one, and the SHA-256 of its image."""
        row = self._gallery.row_of(hit.id)
        if row is None or self._gallery.kind == "text":
            return None, ""
        return self._gallery.item(row)["thumbnail"], self._gallery.contents_of([row])[0]
