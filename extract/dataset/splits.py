"""Splits by image: from a table's column, from official lists of names, or seeded."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onceover.extract.dataset import Dataset, DatasetError
from onceover.extract.dataset.text import read_lines
from onceover.extract.ledger import MAX_ID, NOT_USABLE, Failure
from onceover.extract.names import shown

SPLITS = ("train", "dev", "test")  # an image that belongs to none of them has the split ""
#: words for splits, in tables, in names of files and folders
SPLIT_WORDS = {split: split for split in SPLITS} | {
    "": "",
    "training": "train",
    "testing": "test",
    "development": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "restval": "train",  # COCO's validation images that neither validate nor test
}
#: layouts of datasets that are published with splits
_PUBLISHED = ("original", "kaggle", "flickr30k", "karpathy", "coco")
_SPLIT_LIST = "Flickr_8k.{}Images.txt"


def column_splits(names: Sequence[str], words: Sequence[str], source: Path) -> dict[str, str]:
    """The split of each image, from the words that a table has in its rows.

    Raises:
        DatasetError: an unknown word, or an image in two splits.
    """
    splits: dict[str, str] = {}
    for name, word in zip(names, words, strict=True):
        split = SPLIT_WORDS.get(word.strip().lower())
        if split is None:
            raise DatasetError(f"{source}: {shown(name)} has the split {word!r:.80}; use train, dev or test")
        if splits.setdefault(name, split) != split:
            raise DatasetError(
                f"{source}: {shown(name)} is in two splits ({splits[name]!r}, {split!r}); an image has one"
            )
    return splits


def is_split_word(name: str) -> bool:
    """Whether a folder's name is that of a split, and tells nothing else."""
    return bool(SPLIT_WORDS.get(name.lower()))


def split_of(name: str) -> str:
    """The split that the name of a file or folder tells, as ``train2017`` does; "" where it tells none, or several."""
    words = re.findall(r"[a-z]+", name.lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else ""


def named_splits(names: Sequence[str]) -> list[str]:
    """The splits that the names of files or folders tell (``train-000.tar``, ``val/000.tar``).

    Each is "" unless every name tells just one. Where all are train there is nothing to choose and report on, so that
    they are "" too, and a seeded split is made.
    """
    splits = list(map(split_of, names))
    if "" in splits or set(splits) == {"train"}:
        return [""] * len(names)
    return splits


def with_splits(dataset: Dataset, captions_file: Path, seed: int) -> Dataset:
    """Splits from the official lists, where they lie in the data folder or beside the captions, else seeded ones."""
    chosen: dict[str, str] = {}
    used = []
    for split in SPLITS:
        for folder in dict.fromkeys((dataset.root, captions_file.parent)):
            path = folder / _SPLIT_LIST.format(split)
            if not path.is_file():
                continue
            used.append(path.name)
            for name in filter(None, map(str.strip, read_lines(path))):
                if chosen.setdefault(name, split) != split:
                    raise DatasetError(
                        f"{path}: {shown(name)} is in the list of {chosen[name]} too; an image has one split"
                    )
            break
    if not used:
        splits = [_seeded_split(name, seed) for name in dataset.ids]
        counts = ", ".join(f"{splits.count(split):,} {split}" for split in SPLITS)
        note = f"no split lists found: split by image with seed {seed} ({counts})"
        if dataset.layout in _PUBLISHED:
            note += "; this is not the published split"
        return replace(dataset, splits=splits, notes=[*dataset.notes, note])
    absent = sorted(chosen.keys() - set(dataset.ids))
    failures = []
    for name in absent:
        failures.append(Failure(name[:MAX_ID], "split", f"listed in {chosen[name]}, but {NOT_USABLE}"))
    return replace(
        dataset,
        splits=[chosen.get(name, "") for name in dataset.ids],
        failures=dataset.failures + failures,
        notes=[*dataset.notes, f"splits from {', '.join(used)}"],
    )


def _seeded_split(image_id: str, seed: int) -> str:
    share = int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "dev" if share < 0.9 else "test"
