"""The map: a sample of the gallery's images, with a caption each, in two dimensions."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

import numpy as np

from onceover.analysis.coordinates import pca, tsne
from onceover.base.progress import LOGGER
from onceover.serve.lookup import Served, ids_of, paths_by_id, row_of
from onceover.serve.messages import MapMessage, PointMessage

MAX_IMAGES = 1000
_LEAST_POINTS = 4  # of which t-SNE makes a map


@dataclass(frozen=True)
class _Point:
    """An item on the map: its kind, id, caption and split, and the id of the image to show."""

    kind: Literal["image", "caption"]
    id: str
    caption: str
    split: str | None
    image: str


@dataclass
class EmbeddingMap:
    """The coordinates of a seeded sample of images and of their first captions.

    PCA is there at once; t-SNE takes seconds, and is computed in a thread when the map is first asked for.

    Args:
        galleries: by kind, without thumbnails; there need be no captions. splits: by id of an image.
        stamp: of the addresses of images. shown_path: a path as it is shown.
    """

    galleries: dict[str, Served]
    splits: dict[str, str]
    stamp: str
    shown_path: Callable[[str], str]
    seed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _points: list[_Point] = field(default_factory=list)
    _coordinates: dict[str, np.ndarray] = field(default_factory=dict)

    def message(self) -> MapMessage:
        """The map as it is now, as the API gives it."""
        with self._lock:
            if not self._points:
                self._begin()
            points = list(self._points)
            coordinates = dict(self._coordinates)
        count = sum(point.kind == "image" for point in points)
        pairs = {}
        for point in points:
            if point.kind == "caption":
                pairs[f"caption:{point.id}"] = f"image:{point.image}"
                pairs[f"image:{point.image}"] = f"caption:{point.id}"
        return MapMessage(
            points=[self._described(number, point, coordinates, pairs) for number, point in enumerate(points)],
            images=count,
            of=len(self.galleries["image"]) if "image" in self.galleries else 0,
            is_complete="tsne" in coordinates or len(points) < _LEAST_POINTS,
        )

    def _begin(self) -> None:
        """Draws the sample, projects it by PCA, and begins with t-SNE."""
        if "image" not in self.galleries:
            return
        self._points, vectors = self._sample()
        if len(vectors) < _LEAST_POINTS:
            self._coordinates["pca"] = np.zeros((len(vectors), 2))
            return
        self._coordinates["pca"] = pca(vectors)[0]
        threading.Thread(target=self._finish, args=(vectors,), name="onceover-map", daemon=True).start()

    def _finish(self, vectors: np.ndarray) -> None:
        """Computes t-SNE; where that fails the map stays one by PCA."""
        try:
            coordinates = tsne(vectors, self.seed)
        except Exception as error:  # of scikit-learn, on vectors that are all alike
            LOGGER.debug("no t-SNE: %s", error)
            coordinates = self._coordinates["pca"]
        with self._lock:
            self._coordinates["tsne"] = coordinates

    def _sample(self) -> tuple[list[_Point], np.ndarray]:
        """The items on the map, and their vectors, float32 (N, D): images, then captions."""
        images = self.galleries["image"]
        captions = self.galleries.get("text")
        names = ids_of(images)
        chosen = np.sort(np.random.default_rng(self.seed).permutation(len(names))[:MAX_IMAGES])
        wanted: dict[str, str] = {}  # path -> id of an image whose caption is still to be found
        points = []
        rows = []
        for number in chosen.tolist():
            name = names[number]
            row = row_of(images, name)
            values = images.item(row)
            caption = values["captions"][0] if values["captions"] else self.shown_path(values["path"])
            points.append(_Point("image", name, caption, self.splits.get(name), name))
            rows.append(images.vector(row))
            if values["path"]:
                wanted[values["path"]] = name
        if captions is None:
            return points, np.array(rows, np.float32)
        for name, path in paths_by_id(captions).items():
            image = wanted.pop(path, None)
            if image is None:
                continue
            row = row_of(captions, name)
            caption = captions.item(row)["captions"][0]
            points.append(_Point("caption", name, caption, self.splits.get(image), image))
            rows.append(captions.vector(row))
        return points, np.array(rows, np.float32)

    def _described(
        self, number: int, point: _Point, coordinates: dict[str, np.ndarray], pairs: dict[str, str]
    ) -> PointMessage:
        name = f"{point.kind}:{point.id}"
        return PointMessage(
            id=name,
            kind=point.kind,
            x={name: float(places[number, 0]) for name, places in coordinates.items()},
            y={name: float(places[number, 1]) for name, places in coordinates.items()},
            split=point.split,
            caption=point.caption,
            pair=pairs.get(name),
            image=f"api/items/image/thumbnail?id={quote(point.image, safe='')}&stamp={self.stamp}",
        )
