"""Checks before an index is changed: is it of the same source and run, and are its images still there."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from onceover.base.formats import CURRENT
from onceover.extract.listing import is_excluded
from onceover.retrieval.index.manifest import AND, folders_of, read_manifest
from onceover.retrieval.index.reader import Index
from onceover.retrieval.index.types import IndexingError

_MOST_VANISHED = 0.5  # of the indexed items; more than that do not vanish by themselves


def check_vanished(
    folder: str | Path, items: Iterable[str], folders: Sequence[str], exclude: Collection[str] = ()
) -> None:
    """Refuses to go on where so many items have vanished that a disk may not be mounted.

    That is more than half of the items of the index in ``folder``, or all images of a subfolder. Images of folders that
    the index did not have make up for none.

    Args:
        items: ids of the images, or the captions, that are in ``folders`` now; the latter are as ``update`` takes them,
            or name the file of the captions.
        exclude: patterns of images that are left out on purpose, as ``extract.listing.is_excluded`` takes them.

    Raises:
        IndexingError: so many have vanished, or a damaged index.
    """
    if not (Path(folder) / CURRENT).exists():
        return
    index = Index(folder)
    source = source_of(folders)
    empty: list[str] = []
    if index.kind == "image":
        noun = "images"
        earlier = folders_of(index.manifest)
        before = [name for name in _within(index.ids(), earlier) if not is_excluded(_relative(name, folders), exclude)]
        now = set(_within(items, folders))
        empty = sorted(_subfolders(before) - _subfolders(now), key=lambda name: (name.count("/"), name))
    else:
        noun = "captions"
        before = index.captions()
        now = set(items)
    gone = [name for name in before if name not in now]
    if len(gone) <= _MOST_VANISHED * len(before) and not empty:
        return
    hint = ""
    if empty:
        hint = f" (no image of {_relative(empty[0], folders)}/ is there)"
    raise IndexingError(
        f"{len(gone):,} of {len(before):,} indexed {noun} are no longer in {source}{hint}; is a disk not mounted? "
        "--prune drops them, --force goes on without them and keeps their features"
    )


def _within(ids: Iterable[str], folders: Sequence[str]) -> list[str]:
    """The paths on this machine, or the addresses, of images: of one folder their ids are relative to it."""
    return list(ids) if len(folders) > 1 else [f"{folders[0]}/{name}" for name in ids]


def _relative(name: str, folders: Sequence[str]) -> str:
    """The path within its folder of an image whose id is a path on this machine; any other id as it is."""
    for folder in folders:
        if name.startswith(f"{folder}/"):
            return name[len(folder) + 1 :]
    return name


def _subfolders(ids: Iterable[str]) -> set[str]:
    """All folders, as whole paths, that hold one of the images or a folder that does."""
    folders: set[str] = set()
    for name in ids:
        folders.update(str(parent) for parent in PurePosixPath(name).parents)
    return folders - {"."}


def source_of(folders: Sequence[str]) -> str:
    """The source of an index of these folders, or of one file, as messages name it."""
    return AND.join(sorted(folders))


def has_grown(before: dict, folders: Sequence[str]) -> bool:
    """Whether folders were added to those of an index, by its manifest."""
    return set(folders_of(before)) < set(folders)


def check_origin(
    folder: str | Path, source: str, run: str, space: str, force: bool = False, folders: Sequence[str] = ()
) -> dict | None:
    """Returns the manifest of the index that is in ``folder``, if there is one; ``force`` overlooks a damaged one.

    A run that was fitted again may replace what it made before; another run may not. Folders may be added.

    Args:
        folders: of which the source consists, where it is one or several folders of images.

    Raises:
        IndexingError: it is an index of something else or by another run, or damaged, and ``force`` is not given.
    """
    if not (Path(folder) / CURRENT).exists():
        return None
    try:
        before = read_manifest(folder)
    except IndexingError:
        if force:
            return None
        raise
    is_same = set(folders_of(before)) == set(folders) if folders else before["source"] == source
    if not is_same and not has_grown(before, folders) and not force:
        raise IndexingError(f"{folder} indexes {before['source']}, not {source}; name another --index, or --force")
    if before["run"] != run and before["space"] != space and not force:
        raise IndexingError(
            f"{folder} was made with the run {before['run']}; name that one, another --index, or --force"
        )
    return before
