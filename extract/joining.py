"""Stores of one dataset -> one store with the features of all their encoders side by side, without encoding again.

Images are matched by content, and captions by their image and text, so that rows may lie in another order. Memory stays
at a block of rows, however large the stores.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onceover.base.files import check_disk, digest, only_writer
from onceover.base.progress import ProgressBar, say
from onceover.base.texts import ChosenTexts
from onceover.extract.encoder_files import numbered_files
from onceover.extract.encoders import SEPARATOR
from onceover.extract.join_matching import JoinError, MatchedRows, has_imported_images, match_rows, paths_of
from onceover.extract.joined import Part, joined_recipe, parts_of, shared_views
from onceover.extract.sealing import Rows, seal
from onceover.extract.shards import RowSources
from onceover.extract.store import KINDS, FeatureStore, dataset_fingerprint, row_blocks, store_exists
from onceover.extract.store_form import StorePlace, is_same_store, store_place
from onceover.extract.summary import Summary, summary_of

_SETTINGS = {  # of an extraction, that belong to one kind of features
    "image": ("image_encoder", "image_layers", "views"),
    "text": ("text_encoder", "text_layers", "text_pooling", "max_length"),
}
_ROW_BYTES = {"image": 8192, "text": 512}  # about what a row takes beside its features


@dataclass(frozen=True)
class _Columns:
    """The columns of one encoder in the features of a store, which is given by its number."""

    store: int
    columns: slice
    part: Part


class _JoinedRows:
    """The features of several stores side by side, from which ``seal`` copies them into the joined store.

    Args:
        stores: the stores that are joined. rows: the rows to take of each store.
        columns: the columns of each encoder, in the order in which they are joined.
        views: how many views of an image are taken; None for captions.
    """

    def __init__(
        self,
        kind: str,
        stores: Sequence[FeatureStore],
        rows: Sequence[np.ndarray],
        columns: Sequence[_Columns],
        views: int | None,
    ):
        self._kind = kind
        self._stores = stores
        self._rows = rows
        self._columns = columns
        self._views = views
        width = sum(part.columns.stop - part.columns.start for part in columns)
        self.shape = (len(rows[0]), width) if views is None else (len(rows[0]), views, width)
        self.dtype = np.result_type(*(stores[part.store].features(kind).dtype for part in columns))
        self._thumbnails = None if kind == "text" else self._first_thumbnails()

    def _first_thumbnails(self) -> tuple[Sequence[bytes], np.ndarray] | None:
        """The thumbnails of the first store that has some, and the rows to take of them."""
        for store, rows in zip(self._stores, self._rows, strict=True):
            thumbnails = store.thumbnails()
            if thumbnails is not None:
                return thumbnails, rows
        return None

    @property
    def nbytes(self) -> int:
        """The bytes of all features."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def blocks(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The features and the other columns, a block of rows at a time."""
        with ProgressBar(f"joining {self._kind}", "rows", total=len(keys)) as bar:
            for rows in row_blocks(len(keys)) if keys else [slice(0, 0)]:
                columns: dict[str, Any] = {"features": self._block(rows)}
                if self._kind == "text":
                    cut = [store.truncated[own[rows]] for store, own in zip(self._stores, self._rows, strict=True)]
                    columns["truncated"] = np.logical_or.reduce(cut)
                elif self._thumbnails is not None:
                    thumbnails, own = self._thumbnails
                    columns["thumbnail"] = [np.frombuffer(thumbnails[row], np.uint8) for row in own[rows].tolist()]
                yield columns
                bar.update(rows.stop - rows.start)

    def _block(self, block: slice) -> np.ndarray:
        """Some rows with the columns of all encoders; each store is read once."""
        read = {}
        for number in {part.store for part in self._columns}:
            read[number] = self._stores[number].features(self._kind)[self._rows[number][block]]
        parts = [read[part.store][..., part.columns] for part in self._columns]
        if self._views is not None:
            parts = [part[:, : self._views] for part in parts]
        return np.concatenate(parts, axis=-1, dtype=self.dtype)


def join_stores(
    stores: Sequence[str | Path], path: str | Path, *, common: bool = False, force: bool = False
) -> Summary:
    """Writes the store ``path`` with the features of several stores of one dataset side by side.

    An encoder that several of the stores have in common is taken once. Ids, paths, splits and the order of the rows are
    those of the first store, or of the first that was extracted, where some were imported.

    Args:
        common: take the images and captions that all stores have, and write the others into the ledger.
        force: replace another store at ``path``.

    Raises:
        JoinError: fewer than two stores, other images, captions or splits, nothing that differs, or another store at
            ``path``.
        StoreError: a store cannot be read.
        FileError: no room on the disk, or another process is writing.
    """
    start = time.monotonic()
    place = store_place(path)
    path = place.path
    if len(stores) < 2:
        raise JoinError("there is nothing to join: name two stores or more")
    for store in stores:
        if is_same_store(store, place.store):
            raise JoinError(f"{place.store} is one of the stores to join; write the joined store to another place")
    with contextlib.ExitStack() as stack, only_writer(path, "the store"):
        opened = [stack.enter_context(FeatureStore(store)) for store in stores]
        up_to_date = _write(opened, place, common, force)
    with FeatureStore(place.store) as joined:
        summary = summary_of(joined, up_to_date)
    summary.seconds = time.monotonic() - start
    return summary


def _write(stores: list[FeatureStore], place: StorePlace, common: bool, force: bool) -> bool:
    """Writes the joined store; returns True where it is there already and nothing was written."""
    path = place.path
    columns = {kind: _distinct_columns(stores, kind) for kind in KINDS}
    if all(len(parts) < 2 for parts in columns.values()):
        raise JoinError(f"{paths_of(stores)} hold features of the same encoders; there is nothing to join")
    base = next((number for number, store in enumerate(stores) if not has_imported_images(store)), 0)
    matched = match_rows(stores, base, common)
    recipes, sources = _features(stores, matched, columns)
    leading = stores[base]
    images = _image_columns(stores, matched, base)
    texts: dict[str, Any] = {
        "caption": ChosenTexts(leading.captions, matched.captions[base]),
        "image_index": matched.image_index,
    }
    content = dataset_fingerprint(
        images["id"], images["sha256"], images["split"], texts["caption"], texts["image_index"]
    )
    fingerprints = {kind: digest(recipe) for kind, recipe in recipes.items()} | {"dataset": content}
    if store_exists(place.store):
        with FeatureStore(place.store) as old:
            if old.fingerprints == fingerprints:
                return True
        if not force:
            raise JoinError(
                f"{place.store} holds other features or rows; name another place, or replace them with --force"
            )
    _announce(columns, recipes, stores, matched)
    rows = {"image": len(images["id"]), "text": len(texts["caption"])}
    needed = sum(_ROW_BYTES[kind] * count for kind, count in rows.items())
    features = sum(source.nbytes for source in sources.values() if isinstance(source, _JoinedRows))
    check_disk(path, needed + features)
    seal(
        path,
        form=place.form_for(features),
        destination=place.destination,
        images=images,
        texts=texts,
        sources=sources,
        recipes=recipes,
        provenance=_provenance(stores, base, columns, recipes, images["split"], common),
        failures=matched.failures,
        tokenizer_files=_tokenizer_files(columns["text"]),
    )
    return False


def _distinct_columns(stores: Sequence[FeatureStore], kind: str) -> list[_Columns]:
    """The columns of a kind that are joined: those of each encoder once, in the order of the stores."""
    chosen: dict[str, _Columns] = {}
    for number, store in enumerate(stores):
        if not store.recipes[kind]:
            continue
        tokenizer_files = store.tokenizer_files if kind == "text" else {}
        parts = parts_of(store.recipes[kind], store.provenance[kind], store.provenance["settings"], tokenizer_files)
        width = store.features(kind).shape[-1]
        start = 0
        for part in parts:
            end = start + part.provenance.get("dim", width)
            chosen.setdefault(digest(part.recipe), _Columns(number, slice(start, end), part))
            start = end
    return list(chosen.values())


def _features(
    stores: Sequence[FeatureStore], matched: MatchedRows, columns: dict[str, list[_Columns]]
) -> tuple[dict[str, dict], dict[str, Rows]]:
    """The recipe of the joined features of each kind, and the rows to copy; no store may have any of a kind."""
    recipes: dict[str, dict] = {}
    sources: dict[str, Rows] = {}
    for kind, rows in (("image", matched.images), ("text", matched.captions)):
        parts = columns[kind]
        recipes[kind] = {}
        sources[kind] = RowSources(kind, "", ())
        if not parts:
            continue
        of_parts = [part.part.recipe for part in parts]
        views = len(shared_views(of_parts)) if kind == "image" else None
        source = _JoinedRows(kind, stores, rows, parts, views)
        sources[kind] = source
        recipes[kind] = of_parts[0]
        if len(parts) > 1:
            recipes[kind] = joined_recipe(kind, of_parts, source.dtype.name)
    return recipes, sources


def _image_columns(stores: Sequence[FeatureStore], matched: MatchedRows, base: int) -> dict[str, Any]:
    """The columns of the images beside their features."""
    leading = stores[base]
    rows = matched.images[base]
    size, mtime_ns = leading.image_stats()
    contents: Sequence[str] = ChosenTexts(leading.sha256, rows)
    if all(has_imported_images(store) for store in stores):
        by_store = []
        for store, own_rows in zip(stores, matched.images, strict=True):
            by_store.append(ChosenTexts(store.sha256, own_rows))
        contents = [digest(list(same)) for same in zip(*by_store, strict=True)]
    return {
        "id": ChosenTexts(leading.image_ids, rows),
        "path": ChosenTexts(leading.image_paths, rows),
        "split": ChosenTexts(leading.image_splits, rows),
        "sha256": contents,
        "size": size[rows],
        "mtime_ns": mtime_ns[rows],
    }


def _tokenizer_files(columns: Sequence[_Columns]) -> dict[str, bytes]:
    """The tokenizer's files of the one text encoder, or those of several, numbered."""
    files = [part.part.tokenizer_files for part in columns]
    return files[0] if len(files) == 1 else numbered_files(files)


def _announce(
    columns: dict[str, list[_Columns]], recipes: dict[str, dict], stores: Sequence[FeatureStore], matched: MatchedRows
) -> None:
    """Says which encoders and how many rows are joined, and what is left out."""
    for kind, parts in columns.items():
        widths = []
        for part in parts:
            widths.append(f"{part.part.provenance['encoder']} ({part.columns.stop - part.columns.start:,} numbers)")
        if widths:
            say(f"{kind}: {SEPARATOR.join(widths)}{'' if len(parts) > 1 else ', the same in all stores'}")
    counts = [stores[part.store].image_features.shape[1] for part in columns["image"]]
    shared = len(recipes["image"].get("views", ())) or min(counts, default=0)
    if counts and max(counts) > shared:
        say(f"views of each image: {shared}, those that all have; the stores have {min(counts)} to {max(counts)}")
    images = len(matched.images[0])
    captions = len(matched.captions[0])
    dropped = []
    for store in stores:
        if len(store.image_ids) > images:
            dropped.append(f"{len(store.image_ids) - images:,} of {store.path}")
    say(f"joining {images:,} images and {captions:,} captions, without encoding")
    if dropped:
        say(f"images that not all stores have, left out: {', '.join(dropped)}")


def _provenance(
    stores: Sequence[FeatureStore],
    base: int,
    columns: dict[str, list[_Columns]],
    recipes: dict[str, dict],
    splits: Sequence[str],
    common: bool,
) -> dict:
    """The provenance of the joined store, with the keys of an extraction's; each encoder's own is in ``parts``."""
    leading = stores[base].provenance
    settings = dict(stores[0].provenance["settings"])
    by_kind: dict[str, dict] = {"image": {}, "text": {}}
    for kind, parts in columns.items():
        if not parts:
            by_kind[kind] = stores[0].provenance[kind]
            continue
        own_settings = parts[0].part.settings
        settings |= {name: own_settings[name] for name in _SETTINGS[kind]}
        by_kind[kind] = parts[0].part.provenance
        if len(parts) > 1:
            by_kind[kind] = _provenance_of_parts(parts)
            settings[f"{kind}_encoder"] = by_kind[kind]["encoder"]
    settings["views"] = len(recipes["image"].get("views", ())) or settings["views"]
    return {
        "data": leading["data"],
        "layout": leading["layout"],
        "notes": list(dict.fromkeys(note for store in stores for note in store.provenance["notes"])),
        "splits": dict(Counter(splits)),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings,
        "listing": None,  # no extraction finds its own here
        "request": None,
        "joined": {"stores": [str(store.path.resolve()) for store in stores], "common": common},
        **by_kind,
    }


def _provenance_of_parts(parts: Sequence[_Columns]) -> dict:
    """The provenance of joined features of a kind."""
    records = []
    for part in parts:
        own = {"settings": part.part.settings, "dim": part.columns.stop - part.columns.start}
        records.append(part.part.provenance | own)
    return {
        "encoder": SEPARATOR.join(record["encoder"] for record in records),
        "seed": records[0]["seed"],
        "parts": records,
    }
