"""Refusals of an extraction: other features in the store that is there, and rows that would be lost."""

from onceover.base.files import digest
from onceover.extract.changes import contents_of
from onceover.extract.dataset import Dataset
from onceover.extract.joined import is_joined
from onceover.extract.ledger import Failure
from onceover.extract.shards import describe_shard
from onceover.extract.store import FeatureStore, StoreError, changed_settings
from onceover.extract.unfinished import Unfinished


def refuse_other_features(kind: str, recipe: dict, old: FeatureStore | None, force: bool) -> None:
    """Refuses features of another fingerprint than those of the store, which ``force`` replaces.

    Raises:
        StoreError: the fingerprints differ.
    """
    if old is not None and is_joined(old.recipes[kind]) and not is_joined(recipe) and not force:
        raise StoreError(
            f"{old.path} holds joined {kind} features of several encoders, and is not extended; extend the stores that "
            "it was joined from, and join them again with --force"
        )
    if old is not None and old.fingerprints[kind] != digest(recipe) and not force:
        changed = changed_settings(recipe, old.recipes[kind])
        raise StoreError(
            f"{old.path} holds other {kind} features (they differ in: {changed}); "
            "name another --store, or replace them with --force"
        )


def refuse_other_shards(kind: str, recipe: dict, unfinished: Unfinished, force: bool) -> None:
    """Refuses features of another fingerprint than those of shards that were begun, which ``force`` removes.

    Raises:
        StoreError: the fingerprints differ.
    """
    for shard in unfinished.shards(kind):
        if describe_shard(shard)[1] == digest(recipe):
            continue
        if not force:
            raise StoreError(
                f"{unfinished.folder} holds an unfinished extraction of other {kind} features; "
                "run that command again, or discard it with --force"
            )
        shard.unlink()


def refuse_to_drop_rows(old: FeatureStore, dataset: Dataset) -> None:
    """Refuses a dataset that lacks rows of the store. An image with another name and the same content is there.

    Raises:
        StoreError: it lacks some.
    """
    ids = set(dataset.ids)
    lost = [row for row, name in enumerate(old.image_ids) if name not in ids]
    if lost:
        contents = contents_of(dataset, ids.difference(old.image_ids))
        lost = [row for row in lost if old.sha256[row] not in contents]
    captions = set(old.captions).difference(dataset.captions)
    counts = {"images": len(lost), "different captions": len(captions)}
    if lost or captions:
        rows = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        raise StoreError(
            f"{old.path} holds {rows} that {dataset.root} has no more, or that were not asked for, and that "
            "would be dropped: name another --store, or drop them with --prune"
        )


def refuse_to_lose_images(old: FeatureStore, failures: list[Failure], share: float) -> None:
    """Refuses to write a store without images that it has, and that cannot be read or decoded any more.

    Args:
        failures: the images that could not be encoded. share: of the store's images, what may be lost.

    Raises:
        StoreError: more are lost.
    """
    stored = set(old.image_ids)
    lost = [failure for failure in failures if failure.id in stored]
    if len(lost) > share * len(stored):
        raise StoreError(
            f"{len(lost):,} images of {old.path} cannot be read now and would be dropped (the first: {lost[0].id}: "
            f"{lost[0].reason}); mend that and run the same command again, or drop them with --prune"
        )
