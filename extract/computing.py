"""Has the images, and then the captions, of an extraction encoded by its engine, shard by shard."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from onceover.base.files import FileError, digest
from onceover.base.progress import LOGGER, ProgressBar, say, warn
from onceover.extract.changes import new_images
from onceover.extract.extraction import Extraction, Work
from onceover.extract.plan import CAPTIONS_PER_IMAGE, Shard, plan_shards, shards_of
from onceover.extract.shards import RowSources
from onceover.extract.summary import Speed, shares

if TYPE_CHECKING:
    from onceover.extract.encode import Encoding

CAPTION_BLOCKS_ON_GPU = 2  # captions are sorted in larger blocks there, since batches are larger


def encode_images(extraction: Extraction, work: Work) -> RowSources:
    """Has the new images encoded; gives the rows of all."""
    from onceover.extract.encode import ImageEncoding

    assert work.image is not None
    dataset = extraction.dataset
    config = extraction.config
    recipe = work.image.recipe
    columns = ("thumbnail",) if config.thumbnails else ()
    sources = extraction.sources("image", recipe, columns)
    choose = partial(new_images, dataset, extraction.stats, sources, extraction.options.retry_failures)
    shards = _shards(extraction, work, "image", extraction.listing, columns, choose)
    views = len(work.image.preprocessing.views)
    _announce(work, "image", shards, f"{config.image_encoder}, {views} views", len(dataset.ids))
    known = extraction.stored("image", recipe, ())
    bare = sum(key not in sources for key in known)
    if bare:
        say(f"{bare:,} images have features already, and only get their thumbnails")
    encoding = ImageEncoding(
        partial(work.make["image"], dtype=recipe["dtype"], backend=work.image.backend),
        work.image,
        images=dataset.images,
        ids=dataset.ids,
        paths=dataset.paths,
        stats=extraction.stats,
        known=known,
        batch_size=work.batch_size,
        thumbnails=config.thumbnails,
        store_dtype=config.store_dtype,
    )
    _compute(work, encoding, shards)
    return extraction.sources("image", recipe, columns)


def encode_captions(extraction: Extraction, work: Work, captions: list[str]) -> RowSources:
    """Has the new ones of some captions, each of which stands there once, encoded; gives the rows of all."""
    from onceover.extract.encode import TextEncoding

    assert work.text is not None
    recipe = work.text.recipe
    columns = ("truncated",)
    sources = extraction.sources("text", recipe, columns)

    def choose() -> list[int]:
        return [row for row, caption in enumerate(captions) if caption not in sources]

    shards = _shards(extraction, work, "text", digest(captions), columns, choose)
    _announce(work, "text", shards, extraction.config.text_encoder, len(captions))
    encoding = TextEncoding(
        partial(work.make["text"], dtype=recipe["dtype"], backend=work.text.backend),
        work.text,
        captions=captions,
        batch_size=work.batch_size * CAPTIONS_PER_IMAGE,
        described=extraction.config.text_encoder,
        store_dtype=extraction.config.store_dtype,
    )
    _compute(work, encoding, shards)
    return extraction.sources("text", recipe, columns)


def _shards(
    extraction: Extraction,
    work: Work,
    kind: str,
    listing: str,
    columns: tuple[str, ...],
    choose: Callable[[], list[int]],
) -> list[Shard]:
    """The shards of a kind. An unfinished extraction's plan, made from the same things, is taken up again.

    Args:
        choose: gives the rows that are to be encoded, for a new plan.
    """
    unfinished = extraction.unfinished
    try:
        plan = unfinished.plan(kind)
    except FileError as error:  # finished shards are taken over all the same
        warn(f"planning anew: {error}")
        plan = {}
    beside = [store.fingerprints for store in (extraction.old, extraction.reuse) if store]
    origin = {
        "listing": listing,
        "fingerprint": digest(work.encoder(kind).recipe),
        "columns": list(columns),
        "beside": beside,
        "retry_failures": extraction.options.retry_failures,
    }
    if not origin.items() <= plan.items():
        device = work.device()
        blocks = 1 if device.type == "cpu" else CAPTION_BLOCKS_ON_GPU
        plan = origin | plan_shards(kind, choose(), work.batch_size, work.engine.workers(device), blocks)
        unfinished.write_plan(kind, plan)
    return shards_of(plan, kind, unfinished.folder)


def _announce(work: Work, kind: str, shards: list[Shard], what: str, total: int) -> None:
    """Counts what is there and what is to be done, and tells the user."""
    new = sum(shard.size for shard in shards if not shard.file.exists())
    work.counts.computed[kind] = new
    work.counts.reused[kind] = total - new
    if not new:
        return
    noun = "images" if kind == "image" else "different captions"
    size = work.batch_size * (CAPTIONS_PER_IMAGE if kind == "text" else 1)
    there = f" ({total - new:,} are there already)" if total > new else ""
    where = f"{work.settings['device']}, {work.engine.describe(kind, work.device())}, batches of {size}"
    say(f"encoding {new:,} {noun}{there} with {what} on {where}, backend {work.encoder(kind).backend}")


def _compute(work: Work, encoding: "Encoding", shards: list[Shard]) -> None:
    """Has the shards encoded that are not there yet, under a progress bar."""
    todo = [shard for shard in shards if not shard.file.exists()]
    rows = sum(shard.size for shard in todo)
    if not todo:
        return
    total = sum(shard.size for shard in shards)
    seconds: Counter[str] = Counter()
    start = time.perf_counter()
    with ProgressBar(encoding.kind, "rows", total=total, initial=total - rows) as bar:
        for progress in work.engine.run(encoding, todo, work.device()):
            seconds.update(progress.seconds)
            bar.show(time=shares(seconds))
            bar.update(progress.rows)
    speed = Speed(rows, time.perf_counter() - start, dict(seconds))
    LOGGER.debug("encoding: %s took %.1f s", encoding.kind, speed.seconds)
    work.counts.speed[encoding.kind] = speed
