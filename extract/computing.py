"""Has shards of images or captions encoded by an extraction's engine, under a progress bar."""

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from onceover.base.progress import LOGGER, ProgressBar, say
from onceover.extract.extraction import Extraction, Work
from onceover.extract.plan import Shard, batch_rows
from onceover.extract.summary import Speed, shares

if TYPE_CHECKING:
    from onceover.extract.encode import Encoding


def encode_shards(
    extraction: Extraction, work: Work, kind: str, captions: Sequence[str], shards: Sequence[Shard], total: int
) -> None:
    """Has those shards of a kind encoded that are not there yet.

    Args:
        captions: that the shards of captions are of. total: rows of the kind, those that need no encoding among them.
    """
    todo = [shard for shard in shards if not shard.file.exists()]
    rows = sum(shard.size for shard in todo)
    work.counts.computed[kind] = rows
    work.counts.reused[kind] = total - rows
    if not todo:
        return
    _announce(extraction, work, kind, rows, total)
    encoding = _image_encoding(extraction, work) if kind == "image" else _text_encoding(extraction, work, captions)
    all_rows = sum(shard.size for shard in shards)
    seconds: Counter[str] = Counter()
    start = time.perf_counter()
    with ProgressBar(kind, "rows", total=all_rows, initial=all_rows - rows) as bar:
        for progress in work.engine.run(encoding, todo, work.device()):
            seconds.update(progress.seconds)
            bar.show(time=shares(seconds))
            bar.update(progress.rows)
    speed = Speed(rows, time.perf_counter() - start, dict(seconds))
    LOGGER.debug("encoding: %s took %.1f s", kind, speed.seconds)
    work.counts.speed[kind] = speed


def _announce(extraction: Extraction, work: Work, kind: str, rows: int, total: int) -> None:
    """Tells the user what is there, what is to be done, and by what means."""
    config = extraction.config
    noun = "different captions"
    what = config.text_encoder
    if kind == "image":
        assert work.image is not None
        noun = "images"
        views = len(work.image.preprocessing.views)
        what = f"{config.image_encoder}, {views} view{'s' if views > 1 else ''}"
    there = f" ({total - rows:,} are there already)" if total > rows else ""
    where = f"{work.settings['device']}, {work.engine.describe(kind, work.device())}"
    batches = f"batches of {batch_rows(kind, work.batch_size)}, backend {work.encoder(kind).backend}"
    say(f"encoding {rows:,} {noun}{there} with {what} on {where}, {batches}")


def _image_encoding(extraction: Extraction, work: Work) -> "Encoding":
    from onceover.extract.encode import ImageEncoding

    assert work.image is not None
    dataset = extraction.dataset
    recipe = work.image.recipe
    known = extraction.stored("image", recipe, ())
    if extraction.config.thumbnails:
        with_thumbnails = extraction.stored("image", recipe, ("thumbnail",))
        bare = len(known) - len(with_thumbnails)
        if bare:
            say(f"{bare:,} images have features already, and only get their thumbnails")
    return ImageEncoding(
        partial(work.make["image"], dtype=recipe["dtype"], backend=work.image.backend),
        work.image,
        images=dataset.images,
        ids=dataset.ids,
        paths=dataset.paths,
        stats=extraction.stats,
        known=known,
        batch_size=work.batch_size,
        thumbnails=extraction.config.thumbnails,
        store_dtype=extraction.config.store_dtype,
    )


def _text_encoding(extraction: Extraction, work: Work, captions: Sequence[str]) -> "Encoding":
    from onceover.extract.encode import TextEncoding

    assert work.text is not None
    return TextEncoding(
        partial(work.make["text"], dtype=work.text.recipe["dtype"], backend=work.text.backend),
        work.text,
        captions=captions,
        batch_size=batch_rows("text", work.batch_size),
        described=extraction.config.text_encoder,
        store_dtype=extraction.config.store_dtype,
    )
