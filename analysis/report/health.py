"""The health of a run's feature store: what was left out or cut, unknown tokens, and duplicates."""

import shlex
from collections import Counter
from typing import Any

import numpy as np

from onceover.analysis.pages.tables import PageTable, page_table
from onceover.analysis.report import near_duplicates
from onceover.analysis.report.files import NO_THUMBNAILS, ReportFiles
from onceover.analysis.report.queries import ShownImage
from onceover.base.terminal import Table
from onceover.extract.ledger import Failure
from onceover.extract.store import FeatureStore
from onceover.extract.unknown import unknown_of

SHOWN = 10  # of each list


def health(files: ReportFiles) -> dict[str, Any]:
    """Counts, lists of their first examples, and pairs of near-duplicates.

    Raises:
        AbsentError: the store is not there.
    """
    store = files.opened_store()
    unknown = unknown_of(store)
    across = store.duplicates_across_splits()
    within = _duplicates_within(store)
    cut = [store.captions[row] for row in np.flatnonzero(store.truncated)[:SHOWN].tolist()]
    return {
        "failures": _failures(store.failures),
        "first_failures": store.failures[:SHOWN],
        "n_failures": len(store.failures),
        "n_cut": int(store.truncated.sum()),
        "cut": cut,
        "unknown": str(unknown) if unknown else None,
        "unknown_warning": unknown.warning() if unknown else None,
        "across": across[:SHOWN],
        "n_across": len(across),
        "within": within[:SHOWN],
        "n_within": len(within),
        "n_captions": len(store.captions),
        "n_different_captions": len(set(store.captions)),
        "near": _near(files, store),
        "threshold": near_duplicates.THRESHOLD,
        "side": near_duplicates.SIDE,
        "shown": SHOWN,
        "info": shlex.join(["onceover", "info", str(store.path)]),
        "no_thumbnails": NO_THUMBNAILS,
        "split": files.run.split,
    }


def _failures(failures: list[Failure]) -> PageTable | None:
    """A table of what was left out, by stage and kind of reason; None where nothing was."""
    if not failures:
        return None
    counts = Counter((failure.stage, failure.reason.partition(":")[0]) for failure in failures)
    rows = [["stage", "reason", "records"]]
    for (stage, reason), count in counts.most_common():
        rows.append([stage, reason, f"{count:,}"])
    return page_table(Table("Records that were left out", rows))


def _duplicates_within(store: FeatureStore) -> list[tuple[str, ...]]:
    """Ids of images of one split with the same bytes."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, content, split in zip(store.image_ids, store.sha256, store.image_splits, strict=True):
        groups.setdefault((content, split), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _near(files: ReportFiles, store: FeatureStore) -> dict[str, Any] | None:
    """The near-duplicates across splits with their images; None without thumbnails."""
    thumbnails = store.thumbnails()
    if thumbnails is None:
        return None
    search = near_duplicates.near_duplicates(thumbnails, store.image_splits, files.run.split)
    pairs = []
    for pair in search.pairs[:SHOWN]:
        images = []
        for row in (pair.reported, pair.other):
            own = np.flatnonzero(store.image_index == row)
            caption = store.captions[int(own[0])] if len(own) else ""
            shown = ShownImage(store.image_ids[row], thumbnails[row], store.image_splits[row], caption=caption)
            images.append(shown)
        pairs.append({"images": images, "cosine": pair.cosine})
    return {"count": len(search.pairs), "reported": search.reported, "others": search.others, "pairs": pairs}
