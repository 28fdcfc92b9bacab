"""Rows that several stores of one dataset have in common: images by content, captions by their image and text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onceover.base.errors import OnceoverError
from onceover.extract.ledger import Failure
from onceover.extract.names import shown
from onceover.extract.store import FeatureStore, caption_ids


class JoinError(OnceoverError):
    """Stores that cannot be joined."""


@dataclass(frozen=True)
class MatchedRows:
    """The rows of a joined store.

    Attributes:
        images, captions: of each store the rows to take, int64, in the same order for all stores.
        image_index: the image of each caption, int64. failures: the ledger of the joined store.
    """

    images: list[np.ndarray]
    captions: list[np.ndarray]
    image_index: np.ndarray
    failures: list[Failure]


def match_rows(stores: Sequence[FeatureStore], base: int, common: bool) -> MatchedRows:
    """The rows that all stores have, in the order of the store ``base``.

    Raises:
        JoinError: rows that not all have, without ``common``; an image in two splits; no row that all have.
    """
    leading = stores[base]
    by_name = any(has_imported_images(store) for store in stores)
    images = [_matching_images(leading, store, by_name) for store in stores]
    captions = [_matching_captions(leading, store, rows) for store, rows in zip(stores, images, strict=True)]
    has_image = np.logical_and.reduce([rows >= 0 for rows in images])
    has_caption = np.logical_and.reduce([rows >= 0 for rows in captions])
    had_captions = np.isin(np.arange(len(has_image)), leading.image_index)
    left_captions = np.isin(np.arange(len(has_image)), leading.image_index[has_caption])
    is_taken = has_image & (left_captions | ~had_captions)
    if not common:
        _refuse_missing(stores, base, images, captions)
    if not is_taken.any() and not has_caption.any():
        raise JoinError(f"{paths_of(stores)} have no image and no caption in common; join stores of one dataset")
    _check_splits(stores, base, images, is_taken)
    new_row = np.cumsum(is_taken) - 1
    index = leading.image_index[has_caption]
    failures = _ledger(stores, base, images, captions)
    for row in np.flatnonzero(has_image & ~is_taken).tolist():
        failures.append(Failure(leading.image_ids[row], "dataset", "not joined: no caption that all stores have"))
    return MatchedRows(
        [rows[is_taken] for rows in images],
        [rows[has_caption] for rows in captions],
        np.where(index >= 0, new_row[index], -1) if len(new_row) else index,
        failures,
    )


def _matching_images(leading: FeatureStore, store: FeatureStore, by_name: bool) -> np.ndarray:
    """The row of each image of ``leading`` in ``store``, int64 (N,), or -1.

    Images of one content are matched by their names first, and those of other names in their order.
    """
    keys = leading.image_ids if by_name else leading.sha256
    own_keys = store.image_ids if by_name else store.sha256
    named = {pair: row for row, pair in enumerate(zip(own_keys, store.image_ids, strict=True))}
    rows = np.array([named.get(pair, -1) for pair in zip(keys, leading.image_ids, strict=True)], dtype=np.int64)
    taken = set(rows.tolist())
    others: dict[str, list[int]] = {}
    for row in range(len(own_keys) - 1, -1, -1):
        if row not in taken:
            others.setdefault(own_keys[row], []).append(row)
    for number in np.flatnonzero(rows < 0).tolist():
        waiting = others.get(keys[number])
        if waiting:
            rows[number] = waiting.pop()
    return rows


def _matching_captions(leading: FeatureStore, store: FeatureStore, images: np.ndarray) -> np.ndarray:
    """The row of each caption of ``leading`` in ``store``, int64 (M,), or -1: of the same image and the same text.

    Args:
        images: the row of each image of ``leading`` in ``store``.
    """
    waiting: dict[tuple[int, str], list[int]] = {}
    for row in range(len(store.captions) - 1, -1, -1):
        waiting.setdefault((int(store.image_index[row]), store.captions[row]), []).append(row)
    rows = np.full(len(leading.captions), -1, np.int64)
    for row, caption in enumerate(leading.captions):
        image = int(leading.image_index[row])
        if image >= 0:
            image = int(images[image])
            if image < 0:
                continue
        same = waiting.get((image, caption))
        if same:
            rows[row] = same.pop()
    return rows


def _refuse_missing(
    stores: Sequence[FeatureStore], base: int, images: Sequence[np.ndarray], captions: Sequence[np.ndarray]
) -> None:
    """Refuses stores of which one lacks rows of another.

    Raises:
        JoinError: how many rows which store lacks.
    """
    leading = stores[base]
    for store, image_rows, caption_rows in zip(stores, images, captions, strict=True):
        missing_images = int((image_rows < 0).sum())
        missing_captions = int((caption_rows < 0).sum())
        further_images = len(store.image_ids) - int((image_rows >= 0).sum())
        further_captions = len(store.captions) - int((caption_rows >= 0).sum())
        shortages = [
            _shortage(leading, store, missing_images, missing_captions),
            _shortage(store, leading, further_images, further_captions),
        ]
        if any(shortages):
            raise JoinError(
                f"the stores do not hold the same rows: {'; '.join(filter(None, shortages))}; extract what is missing, "
                "or join what all have with --common"
            )


def _shortage(holder: FeatureStore, other: FeatureStore, images: int, captions: int) -> str:
    """The numbers of images and captions that ``other`` lacks and ``holder`` has, for a message; "" of none."""
    counts = {"images": images, "captions": captions}
    rows = [f"{count:,} {noun}" for noun, count in counts.items() if count]
    return f"{' and '.join(rows)} of {holder.path} that {other.path} lacks" if rows else ""


def _check_splits(
    stores: Sequence[FeatureStore], base: int, images: Sequence[np.ndarray], is_taken: np.ndarray
) -> None:
    """Refuses stores that have put an image into different splits.

    Raises:
        JoinError: how many images, and the first of them.
    """
    leading = stores[base]
    for store, rows in zip(stores, images, strict=True):
        moved = [
            row
            for row in np.flatnonzero(is_taken).tolist()
            if leading.image_splits[row] != store.image_splits[rows[row]]
        ]
        if moved:
            first = moved[0]
            raise JoinError(
                f"{len(moved):,} images lie in other splits in {store.path} than in {leading.path} (the first: "
                f"{shown(leading.image_ids[first])}, {leading.image_splits[first] or 'none'} and "
                f"{store.image_splits[rows[first]] or 'none'}); extract both with the same splits"
            )


def _ledger(
    stores: Sequence[FeatureStore], base: int, images: Sequence[np.ndarray], captions: Sequence[np.ndarray]
) -> list[Failure]:
    """The ledger of the joined store: the stores' own records, each once, and the rows that some store lacks."""
    failures = [failure for store in stores for failure in store.failures]
    leading = stores[base]
    names = caption_ids(leading.image_ids, leading.image_index)
    for store, image_rows, caption_rows in zip(stores, images, captions, strict=True):
        failures += _lacking(leading.image_ids, np.flatnonzero(image_rows < 0), "dataset", store)
        failures += _lacking(names, np.flatnonzero(caption_rows < 0), "caption", store)
        others = np.setdiff1d(np.arange(len(store.image_ids)), image_rows)
        failures += _lacking(store.image_ids, others, "dataset", leading)
        others = np.setdiff1d(np.arange(len(store.captions)), caption_rows)
        if len(others):
            failures += _lacking(caption_ids(store.image_ids, store.image_index), others, "caption", leading)
    return list(dict.fromkeys(failures))


def _lacking(names: Sequence[str], rows: Iterable[int], stage: str, store: FeatureStore) -> list[Failure]:
    """A record of each of some rows that a store lacks."""
    return [Failure(names[row], stage, f"not joined: {store.path.name} lacks it") for row in rows]


def has_imported_images(store: FeatureStore) -> bool:
    """Whether a store's image features were imported: its digests are of features, so that only names match images."""
    recipe = store.recipes["image"]
    return all(part.get("architecture") == "imported" for part in recipe.get("parts", [recipe]))


def paths_of(stores: Sequence[FeatureStore]) -> str:
    """The stores' paths, for a message."""
    return " and ".join(str(store.path) for store in stores)
