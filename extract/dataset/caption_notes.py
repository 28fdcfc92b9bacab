"""Notes for the user on captions that may not be what was meant: several in one, or the same one several times."""

from collections.abc import Sequence

import numpy as np

#: what stands between captions that are joined to one, with its name
_BETWEEN = {"\n": "line breaks", " | ": "bars"}
_MANY = 0.1  # the share of captions from which joined ones are told
_SOME = 0.01  # the share from which repeated ones are told; Flickr8k has fewer


def notes_on_captions(captions: Sequence[str], image_index: np.ndarray) -> list[str]:
    """Notes on captions that look like several, and on captions that an image has more than once.

    Args:
        image_index: the position of each caption's image.
    """
    notes = []
    for mark, name in _BETWEEN.items():
        joined = sum(mark in caption for caption in captions)
        if joined > _MANY * len(captions):
            notes.append(
                f"captions with {name} in them: {joined:,}; each is taken as one; where it is several, write a row for "
                'each, or a list: ["A dog runs .", "A dog ."]'
            )
    different = set(zip(image_index.tolist(), captions, strict=True))
    repeated = len(captions) - len(different)
    if repeated > _SOME * len(captions):
        notes.append(f"captions that repeat one of the same image, taken all the same: {repeated:,}")
    return notes
