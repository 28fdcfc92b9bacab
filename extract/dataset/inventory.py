"""An inventory of a folder's files in a few words: "results.csv, 31,783 .jpg in flickr30k_images/"."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from onceover.extract.listing import is_image, list_files

_MOST_FILES = 200_000  # that are counted
_MOST_ENTRIES = 8  # that are named
_FEW = 2  # files of a kind in a folder that are named one by one


@dataclass(frozen=True)
class Inventory:
    """The files below a folder; prints as a line.

    Attributes:
        counts: files by their folder and suffix. names: the files that are named, by the same.
    """

    counts: Counter[tuple[str, str]]
    names: dict[tuple[str, str], list[str]]

    @property
    def suffixes(self) -> set[str]:
        """The suffixes that occur, in lower case."""
        return {suffix for _, suffix in self.counts}

    @property
    def only_images(self) -> bool:
        """Whether there are images and nothing else."""
        return all(is_image(f"a{suffix}") for suffix in self.suffixes)

    def __str__(self) -> str:
        entries = []
        for key in sorted(self.counts, key=lambda key: (key[0].count("/"), self.counts[key] > _FEW, key)):
            folder, suffix = key
            if self.counts[key] <= _FEW:
                entries += self.names[key]
                continue
            kind = suffix or "without suffix"
            within = f" in {folder}/" if folder else ""
            entries.append(f"{self.counts[key]:,} {kind}{within}")
        others = len(entries) - _MOST_ENTRIES
        if others > 0:
            entries[_MOST_ENTRIES:] = [f"and {others:,} more kinds of files"]
        return ", ".join(entries)


def inventory(data: Path) -> Inventory:
    """The files below a folder, or the one file ``data``; hidden ones are left out.

    Raises:
        ImageSourceError: the folder cannot be read.
    """
    names = list_files(data).names if data.is_dir() else [data.name]
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], list[str]] = {}
    for name in islice(sorted(names), _MOST_FILES):
        path = PurePosixPath(name)
        folder = "" if str(path.parent) == "." else str(path.parent)
        key = (folder, path.suffix.lower())
        counts[key] += 1
        if counts[key] <= _FEW:
            first.setdefault(key, []).append(name)
    return Inventory(counts, first)
