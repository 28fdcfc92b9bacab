"""Hubs: the images and captions that come up most often among the first hits, whatever is asked."""

from typing import Any, NamedTuple

import numpy as np

from onceover.analysis.report.files import ReportFiles
from onceover.analysis.report.queries import ShownImage, shown_image
from onceover.analysis.report.searched import SearchedSplit
from onceover.retrieval.hubness import NEIGHBOURS, occurrences, skewness

SHOWN = 10


class Hub(NamedTuple):
    """An item that came up so many ``times``: an image, or a caption with its image."""

    times: int
    image: ShownImage
    caption: str | None = None


def hubs(files: ReportFiles) -> dict[str, Any]:
    """Both galleries' hubs, with how often an item comes up on average, how many never do, and the skewness."""
    searched = files.searched
    images = occurrences(searched.images, searched.texts, searched.biases.get("image_bias"))
    captions = occurrences(searched.texts, searched.images, searched.biases.get("text_bias"))
    return {
        "neighbours": NEIGHBOURS,
        "correction": searched.correction,
        "galleries": [
            {"name": "images", "queries": "captions", "hubs": _images(searched, images), **_numbers(images)},
            {"name": "captions", "queries": "images", "hubs": _captions(searched, captions), **_numbers(captions)},
        ],
    }


def _numbers(counts: np.ndarray) -> dict[str, Any]:
    """How often an item comes up on average, how many never do, and the skewness."""
    return {
        "size": len(counts),
        "mean": float(counts.mean()),
        "never": int((counts == 0).sum()),
        "skewness": skewness(counts),
    }


def _images(searched: SearchedSplit, counts: np.ndarray) -> list[Hub]:
    most = np.argsort(-counts, kind="stable")[:SHOWN].tolist()
    return [Hub(int(counts[row]), shown_image(searched, row, f"{counts[row]:,} times")) for row in most]


def _captions(searched: SearchedSplit, counts: np.ndarray) -> list[Hub]:
    most = np.argsort(-counts, kind="stable")[:SHOWN].tolist()
    found = []
    for row in most:
        image = shown_image(searched, int(searched.image_index[row]))
        found.append(Hub(int(counts[row]), image, searched.caption(row)))
    return found
