"""All that one server serves: the engine, the items, the map, and what the page says about them."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from onceover import __version__
from onceover.base.files import digest
from onceover.heads.searching import Collection
from onceover.serve.batching import AT_ONCE
from onceover.serve.engine import Engine
from onceover.serve.items import Items
from onceover.serve.lookup import Served, contents, ids_of, row_of
from onceover.serve.map import EmbeddingMap
from onceover.serve.messages import GalleryMessage, InfoMessage, MapMessage, TakesMessage

_SAMPLE = 24  # images that the page shows before there is a query
_EXAMPLES = 4  # captions
_LONGEST_EXAMPLE = 60  # characters


class Site:
    """What a server serves of a run or an index.

    Args:
        sources: the folder of the run or index, or those of several indexes.
        splits: by id of an image, where they are known.
        roots: folders that the images may have moved to.
        at_once: queries answered together at most.

    Attributes:
        engine: answers queries. items: gives items and their images.
        stamp: changes when the items or their contents do, so that a browser shows no image that it has of others.
    """

    def __init__(
        self,
        collection: Collection,
        sources: Sequence[Path],
        splits: dict[str, str] | None = None,
        roots: Sequence[str | Path] = (),
        at_once: int = AT_ONCE,
    ):
        self._collection = collection
        self._galleries = collection.galleries
        self._name = " + ".join(source.resolve().name for source in sources)
        self._splits = splits or {}
        items = {
            kind: [list(ids_of(gallery)), list(contents(gallery))] for kind, gallery in collection.galleries.items()
        }
        self.stamp = digest([collection.embedder.space, items])[:16]
        self.engine = Engine(collection, at_once)
        self.items = Items(collection, self._splits, roots)
        self._map = EmbeddingMap(self._galleries, self._splits, self.stamp, self.items.shown_path)

    def info(self) -> InfoMessage:
        """What is served, for ``/api/info``."""
        return self._info

    def map(self) -> MapMessage:
        """The map as it is now, for ``/api/map``."""
        return self._map.message()

    def close(self, timeout: float | None = None) -> bool:
        """Ends the engine's thread; whether it ended within ``timeout`` seconds."""
        return self.engine.close(timeout)

    @cached_property
    def _info(self) -> InfoMessage:
        galleries = self._galleries
        provenance = self._collection.run.provenance
        images = ids_of(galleries["image"]) if "image" in galleries else []
        names = _sample(images, _SAMPLE)
        first = next(iter(galleries.values()))
        return InfoMessage(
            version=__version__,
            name=self._name,
            stamp=self.stamp,
            encoders={kind: _shown_encoder(encoder["encoder"]) for kind, encoder in provenance["encoders"].items()},
            dimension=len(first.vector(row_of(first, ids_of(first)[0]))),
            galleries=[
                GalleryMessage.model_validate({"kind": kind, "size": len(galleries[kind])}) for kind in galleries
            ],
            splits=dict(Counter(self._splits[name] for name in images if self._splits.get(name))),
            takes=TakesMessage(**self.engine.takes),
            sample=names,
            examples=self._examples(names),
        )

    def _examples(self, names: list[str]) -> list[str]:
        """Short captions of the sample's images, or else of the captions."""
        galleries = self._galleries
        gallery: Served
        if "text" in galleries:
            gallery = galleries["text"]
            names = _sample(ids_of(gallery), 4 * _SAMPLE)
        else:
            gallery = galleries["image"]
        texts: list[str] = []
        for name in names:
            texts += gallery.item(row_of(gallery, name))["captions"][:1]
        short = [text for text in dict.fromkeys(texts) if len(text) <= _LONGEST_EXAMPLE]
        return short[:_EXAMPLES]


def _shown_encoder(spec: str) -> str:
    """An encoder as it is shown: of one in a folder of this machine, the folder's name."""
    library, _, name = spec.partition(":")
    return f"{library}:{Path(name).name}" if Path(name).is_absolute() else spec


def _sample(names: Sequence[str], count: int) -> list[str]:
    """Some of the names, the same ones each time."""
    return [names[number] for number in np.random.default_rng(0).permutation(len(names))[:count].tolist()]
