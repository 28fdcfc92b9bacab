"""Plans the images and captions of an extraction before the first of them is encoded.

A plan depends on nothing that comes out of encoding, so that all who share an extraction can go by the same one: the
captions of images that turn out to be damaged are encoded, and left out of the store.
"""

from collections.abc import Sequence

import numpy as np

from onceover.base.files import FileError, digest, digest_of_column
from onceover.base.progress import warn
from onceover.base.texts import ChosenTexts, TextColumn, text_column
from onceover.extract.changes import failed_before, new_images
from onceover.extract.extraction import Extraction, Work
from onceover.extract.key_index import different_texts
from onceover.extract.plan import batch_rows, plan_shards

CAPTION_BLOCKS_ON_GPU = 2  # captions are sorted in larger blocks there, since batches are larger


def captions_to_encode(extraction: Extraction, work: Work) -> TextColumn:
    """The dataset's captions, each once, without those of images that failed before and are not tried again."""
    dataset = extraction.dataset
    if work.image is None or extraction.options.retry_failures:
        return different_texts(dataset.captions)
    stored = extraction.stored("image", work.image.recipe, ())
    is_lost = np.zeros(len(dataset.ids) + 1, bool)  # the last one: of captions without an image, whose index is -1
    for row in np.flatnonzero(stored.find_by_stat(dataset.ids, extraction.stats) < 0).tolist():
        is_lost[row] = failed_before(dataset, extraction.stats, stored, row)
    rows = np.flatnonzero(~is_lost[dataset.image_index])
    return different_texts(ChosenTexts(text_column(dataset.captions), rows))


def columns_of(extraction: Extraction, kind: str) -> tuple[str, ...]:
    """The columns that the rows of a kind need beside their features."""
    if kind == "text":
        return ("truncated",)
    return ("thumbnail",) if extraction.config.thumbnails else ()


def earlier_plan(extraction: Extraction, kind: str) -> dict:
    """The plan of a kind in the folder of the extraction; empty where there is none, or a damaged one."""
    try:
        return extraction.unfinished.plan(kind)
    except FileError as error:  # finished shards are taken over all the same
        warn(f"planning anew: {error}")
        return {}


def origin_of(extraction: Extraction, work: Work, kind: str, captions: Sequence[str]) -> dict:
    """What the plan of a kind is made from; one that was made from the same things stands."""
    earlier = [store for store in (extraction.old, extraction.reuse) if store]
    return {
        "listing": extraction.listing if kind == "image" else digest_of_column(captions),
        "fingerprint": digest(work.encoder(kind).recipe),
        "columns": list(columns_of(extraction, kind)),
        "beside": [[store.fingerprints, store.missing_shards()] for store in earlier],
        "retry_failures": extraction.options.retry_failures,
        "batch": batch_rows(kind, work.batch_size),
    }


def new_plan(extraction: Extraction, work: Work, kind: str, captions: Sequence[str], processes: int) -> dict:
    """A plan for the rows of a kind that have no features yet.

    Args:
        captions: all that are to be encoded. processes: how many share it.
    """
    sources = extraction.sources(kind, work.encoder(kind).recipe, columns_of(extraction, kind))
    if kind == "image":
        rows = new_images(extraction.dataset, extraction.stats, sources, extraction.options.retry_failures)
    else:
        rows = np.flatnonzero(sources.find(captions) < 0)
    device = work.device()
    blocks = 1 if device.type == "cpu" else CAPTION_BLOCKS_ON_GPU
    plan = plan_shards(kind, rows, work.batch_size, processes * work.engine.workers(device), blocks)
    return origin_of(extraction, work, kind, captions) | plan
