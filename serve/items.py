"""The items of the galleries by their ids: what the page shows of an image or a caption, and the image itself."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

from onceover.extract.pictures import jpeg_of
from onceover.extract.store import StoreError
from onceover.heads.originals import Originals
from onceover.heads.searching import Collection
from onceover.retrieval.search import Hit
from onceover.serve.lookup import NoItemError, paths_by_id, row_of

VIEW_SIZE = 1024  # pixels, the longer side of an image in its large view
_KEPT_VIEWS = 64


@dataclass(frozen=True)
class Item:
    """An image with its captions, or a caption with its image.

    Attributes:
        path: as the dataset or folder names it; never where it lies on this machine.
        image: the id of the image to show, or None.
        split: None where the gallery has none.
    """

    kind: str
    id: str
    path: str
    captions: list[str]
    image: str | None
    split: str | None


class Items:
    """Looks items up by kind and id, and gives their images.

    Args:
        splits: by id of an image. roots: folders that the images may have moved to.
    """

    def __init__(self, collection: Collection, splits: dict[str, str], roots: Sequence[str | Path]):
        self._galleries = collection.galleries
        self._splits = splits
        self._originals = Originals(collection, "image", roots) if "image" in collection.galleries else None
        self._folders = self._originals.folders if self._originals is not None else []
        if "image" in collection.galleries:  # opens the file of the thumbnails, which may be removed later
            collection.galleries["image"].thumbnail(0)
        self._views: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def item(self, kind: str, name: str) -> Item:
        """The item of a kind with an id.

        Raises:
            NoItemError: there is none.
        """
        values = self._values(kind, name)
        image = self.image_of(kind, name, values["path"])
        split = self._splits.get(image or "")
        return Item(kind, name, self.shown_path(values["path"]), values["captions"], image, split)

    def check(self, kind: str, name: str) -> None:
        """Refuses a name that no item of this kind has.

        Raises:
            NoItemError: there is none.
        """
        row_of(self._galleries.get(kind), name)

    def image_of(self, kind: str, name: str, path: str) -> str | None:
        """The id of the image that an item is, or that a caption belongs to; None where there is none."""
        if kind == "image":
            return name
        return self._image_by_path.get(path)

    def shown(self, kind: str, hit: Hit) -> dict:
        """A hit as the API gives it."""
        values = hit.to_dict()
        values["path"] = self.shown_path(hit.path)
        values["image"] = self.image_of(kind, hit.id, hit.path)
        return values

    def shown_path(self, path: str) -> str:
        """The path of an item as it is shown: never where its folder lies on this machine."""
        for folder in self._folders:
            inside = path.removeprefix(f"{folder.rstrip('/')}/")
            if inside != path:
                return f"{Path(folder).name}/{inside}" if len(self._folders) > 1 else inside
        return PurePath(path).name if _is_absolute(path) else path

    def thumbnail(self, name: str) -> bytes:
        """A small JPEG of an image.

        Raises:
            NoItemError: there is no such image, or none of it was kept and its file is not there.
        """
        row = row_of(self._galleries.get("image"), name)
        with _readable():
            small = self._galleries["image"].thumbnail(row)
        return small or self.view(name)

    def view(self, name: str) -> bytes:
        """A JPEG of an image, at most ``VIEW_SIZE`` pixels: of its file, or its thumbnail where that is not there.

        Raises:
            NoItemError: there is no such image, or nothing to show of it.
        """
        values = self._values("image", name)
        assert self._originals is not None, "there are images"
        with self._lock:
            if name not in self._views:
                hit = Hit(1, 0.0, name, values["path"], [])
                with _readable():
                    image = self._originals.image(self._originals.placed(hit), VIEW_SIZE)
                if image is None:
                    raise NoItemError("the image's file is not there any more, and no thumbnail of it was kept")
                self._views[name] = jpeg_of(image)
            self._views.move_to_end(name)
            while len(self._views) > _KEPT_VIEWS:
                self._views.popitem(last=False)
            return self._views[name]

    def _values(self, kind: str, name: str) -> dict:
        """The path and captions of an item."""
        row = row_of(self._galleries.get(kind), name)
        with _readable():
            return self._galleries[kind].item(row)

    @cached_property
    def _image_by_path(self) -> dict[str, str]:
        gallery = self._galleries.get("image")
        if gallery is None:
            return {}
        return {path: name for name, path in paths_by_id(gallery).items() if path}


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turns what goes wrong when a run or index is read, whose files were removed or replaced since, into an error.

    Raises:
        NoItemError: it cannot be read.
    """
    try:
        yield
    except (OSError, KeyError, RuntimeError, StoreError) as error:
        raise NoItemError("the run's or index's files were removed or replaced; start the server again") from error


def _is_absolute(path: str) -> bool:
    return path.startswith(("/", "\\")) or path[1:3] in (":\\", ":/")
