"""The values that the steps of an extraction share: what is to be encoded, by whom, and what is there already."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onceover.base.files import digest
from onceover.configs.schema import ExtractConfig
from onceover.extract.changes import Stats
from onceover.extract.dataset import Dataset
from onceover.extract.shards import RowSources
from onceover.extract.store import FeatureStore
from onceover.extract.store_form import StorePlace
from onceover.extract.summary import Speed
from onceover.extract.unfinished import Unfinished
from onceover.extract.vanished import kept_shards

if TYPE_CHECKING:
    from onceover.extract.begin import Settings
    from onceover.extract.encoding.image import ImageEncoder
    from onceover.extract.encoding.text import TextEncoder
    from onceover.extract.engines import Engine


@dataclass(frozen=True)
class Options:
    """How an extraction treats what is there, as in ``extract``."""

    force: bool
    retry_failures: bool
    prune: bool
    keep_vanished: bool


@dataclass(frozen=True)
class Extraction:
    """A dataset that is to be extracted, the settings, and the features that are there already.

    Attributes:
        stats: of each image. listing: a digest of all that the dataset lists. request: the features that are asked for.
        path: of the store. unfinished: what there is of it so far.
        old: the store that is there. reuse: another one, whose rows are taken.
        tokenizer_files, encoders, check_encoder: as in ``extract``.
    """

    dataset: Dataset
    stats: Stats
    listing: str
    request: dict
    config: ExtractConfig
    place: StorePlace
    unfinished: Unfinished
    options: Options
    old: FeatureStore | None
    reuse: FeatureStore | None
    tokenizer_files: dict[str, bytes] | None
    encoders: Mapping[str, Callable[..., Any]]
    check_encoder: Callable[[str, dict], None]

    @property
    def path(self) -> Path:
        """Where the store is to lie."""
        return self.place.path

    @property
    def before(self) -> FeatureStore | None:
        """The store whose features are gone on with, if there is one."""
        if self.old is not None and not self.options.force:
            return self.old
        return self.reuse

    def stored(self, kind: str, recipe: dict, columns: tuple[str, ...]) -> RowSources:
        """The rows of earlier stores that can be taken over."""
        sources = RowSources(kind, digest(recipe), columns)
        for store in (self.old, self.reuse):
            if store is not None:
                sources.add(store.path)
        for shard in kept_shards(self.path, kind):
            sources.add(shard)
        return sources

    def sources(self, kind: str, recipe: dict, columns: tuple[str, ...]) -> RowSources:
        """The same, and the rows of this extraction's shards."""
        sources = self.stored(kind, recipe, columns)
        for shard in self.unfinished.shards(kind):
            sources.add(shard)
        return sources


@dataclass
class Counts:
    """Rows that were computed and reused, and how fast, by kind."""

    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    speed: dict[str, Speed] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """The means to encode: settings, the engine with its name, encoders with findings about them, and what was counted.

    ``findings`` are those of ``encoder_checks``, by kind.
    """

    settings: "Settings"
    engine_name: str
    engine: "Engine"
    image: "ImageEncoder | None"
    text: "TextEncoder | None"
    make: dict[str, Callable[..., Any]]
    findings: dict[str, dict]
    counts: Counts = field(default_factory=Counts)

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        size = self.settings["batch_size"]
        assert size is not None
        return size

    def encoder(self, kind: str) -> Any:
        """The encoder of a kind."""
        return self.image if kind == "image" else self.text

    def device(self) -> Any:
        """The device, as torch names it."""
        import torch

        return torch.device(self.settings["device"])
