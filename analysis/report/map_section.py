"""The interactive map of a report: its points as data for ``pages/map.js``."""

import io
from typing import Any

import numpy as np

from onceover.analysis.map_points import map_points
from onceover.analysis.pages import data_url
from onceover.analysis.report.files import NO_THUMBNAILS, ReportFiles
from onceover.extract.pictures import jpeg_of

SIDE = 96  # pixels of a thumbnail
_QUALITY = 75
_DIGITS = 5  # of a coordinate; more would not be seen


def map_section(files: ReportFiles) -> dict[str, Any]:
    """The points, their images once each, and the text below the map."""
    run = files.run
    searched = files.searched
    embeddings = run.embeddings
    points = map_points(run)
    images = points.pairs.images.tolist()
    captions = points.pairs.captions.tolist()
    ranks = _ranks(files)
    rows = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        places = {}
        for name, coordinates in points.coordinates.items():
            both = coordinates[[number, len(images) + number]].ravel()
            places[name] = [float(f"{value:.{_DIGITS}g}") for value in both]
        rows.append(
            {
                "split": embeddings.splits[image],
                "caption": embeddings.captions[caption],
                "ranks": [ranks["image"].get(image), ranks["caption"].get(caption)],
                **places,
            }
        )
    thumbnails = None
    if embeddings.thumbnails is not None:
        thumbnails = [_small(searched.stored_thumbnail(image)) for image in images]
    own = int(np.sum(np.array(embeddings.splits)[images] == run.split))
    shown = f"{own:,} of {run.split}"
    if own < len(images):
        shown += f", and {len(images) - own:,} of other splits, which have no rank"
    drawn = f"{len(images):,} of the {points.pairs.total:,} images with captions, drawn at random (seed {run.seed})"
    if len(images) == points.pairs.total:
        drawn = f"all {len(images):,} images with captions"
    return {
        "data": {
            "rows": rows,
            "thumbnails": thumbnails,
            "galleries": [searched.to_text.gallery, searched.to_image.gallery],
        },
        "shown": f"Shown are {drawn}, with one caption each: {shown}",
        "note": None if thumbnails else NO_THUMBNAILS,
    }


def _ranks(files: ReportFiles) -> dict[str, dict[int, int]]:
    """The ranks of the split's images and captions as queries, by their rows in the embeddings."""
    image_rows, caption_rows, _ = files.run.embeddings.split(files.run.split)
    searched = files.searched
    images = image_rows[searched.to_text.group]
    return {
        "image": dict(
            zip(images.tolist(), np.rint(searched.to_text.expected_rank()).astype(int).tolist(), strict=True)
        ),
        "caption": dict(
            zip(caption_rows.tolist(), np.rint(searched.to_image.expected_rank()).astype(int).tolist(), strict=True)
        ),
    }


def _small(thumbnail: bytes | None) -> str | None:
    """A thumbnail of ``SIDE`` pixels as an address."""
    from PIL import Image

    if thumbnail is None:
        return None
    with Image.open(io.BytesIO(thumbnail), formats=["JPEG"]) as image:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        return data_url(jpeg_of(image, _QUALITY))
