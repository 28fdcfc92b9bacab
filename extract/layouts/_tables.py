"""Datasets of one table of captions, or of several in one folder or in folders called after splits."""

from collections.abc import Container, Sequence
from pathlib import Path

from onceover.extract.dataset.image_folders import FOLDERS
from onceover.extract.dataset.reading import ReadOptions
from onceover.extract.dataset.splits import SPLITS, split_of
from onceover.extract.dataset.table_files import FolderTables, choose_tables, folders_from, split_folders, tables_in
from onceover.extract.layouts import SplitTable, UnreadDataset, beside, in_parts
from onceover.extract.listing import subfolders


def dataset_of_tables(tables: FolderTables, folder: Path, root: Path, options: ReadOptions) -> UnreadDataset:
    """The dataset of the tables in ``folder`` that are to be taken (``choose_tables``), with its images in ``root``.

    Raises:
        DatasetError: several tables, and it cannot be told which to take.
    """
    by_path = {table.path: table for table in tables.tables}
    taken = _taken(tables, folder)
    form = by_path[next(iter(taken))].form
    if tables.files > 1:
        form = f"{form}, in {', '.join(path.name for path in taken)}"
    notes = _notes(tables, taken)
    if len(taken) == 1:
        table = by_path[next(iter(taken))]
        dataset = beside(table.path, root, table.rows, folders_from(root, table.path), options, form)
        dataset.notes.extend(notes)
        return dataset
    parts = []
    for path, split in taken.items():
        folders = (*folders_from(root, path), *split_folders(path.stem, split, root))
        parts.append(SplitTable(path, by_path[path].rows, folders, split))
    dataset = in_parts(root, parts, options, form)
    dataset.notes.extend(notes)
    return dataset


def _taken(tables: FolderTables, folder: Path) -> dict[Path, str]:
    """The tables of a folder that are taken, each with its split, as ``choose_tables`` chooses them."""
    forms = {table.path: table.form for table in tables.tables}
    return choose_tables(list(forms), folder, forms)


def _notes(tables: FolderTables, taken: Container[Path]) -> list[str]:
    """Notes on the tables of captions in a folder that are not taken."""
    left = [table.path.name for table in tables.tables if table.path not in taken]
    notes = [f"passed over: {error}" for error in tables.unknown]
    if left:
        notes.append(f"tables of captions that are left alone: {', '.join(left)}; to take one, name it with --data")
    return notes


def dataset_of_splits(data: Path, options: ReadOptions, names: Sequence[str] = ()) -> UnreadDataset | None:
    """The dataset of tables that lie in folders called after splits: ``train/``, ``validation/``, ``test/``.

    Args:
        names: look only at tables of these names.

    Raises:
        DatasetError: several tables in one of them.
    """
    parts: list[SplitTable] = []
    forms: list[str] = []
    notes: list[str] = []
    for folder in sorted(filter(_is_of_split, subfolders(data)), key=_order):
        tables = tables_in(folder, folder, options, names)
        by_path = {table.path: table for table in tables.tables}
        if not by_path:
            continue
        taken = _taken(tables, folder)
        notes += _notes(tables, taken)
        for path in taken:
            inside = [f"{folder.name}/{name}".removesuffix("/.") for name in FOLDERS]
            parts.append(SplitTable(path, by_path[path].rows, (*inside, *FOLDERS), split_of(folder.name)))
            forms.append(by_path[path].form)
    if not parts:
        return None
    files = ", ".join(f"{part.captions.parent.name}/{part.captions.name}" for part in parts)
    dataset = in_parts(data, parts, options, f"{forms[0]}, in {files}")
    dataset.notes.extend(notes)
    return dataset


def _is_of_split(folder: Path) -> bool:
    """Whether a folder is called after a split."""
    return split_of(folder.name) != ""


def _order(folder: Path) -> tuple[int, str]:
    """The key by which folders are sorted: train, dev, test, then by name."""
    return SPLITS.index(split_of(folder.name)), folder.name
