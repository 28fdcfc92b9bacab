"""The stored files that a report is made of, opened: a run with its store, runs to compare with, a sweep."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onceover.analysis.report.searched import SearchedSplit
from onceover.analysis.sources import RunFiles, read_run, read_sweep
from onceover.base.errors import OnceoverError
from onceover.base.files import read_record
from onceover.base.formats import EMBEDDINGS, PROVENANCE
from onceover.extract.store import FeatureStore, named_store, store_exists
from onceover.retrieval.comparison import check_same_split
from onceover.retrieval.embeddings import Embeddings, read_embeddings
from onceover.retrieval.evaluation import check_store

NO_THUMBNAILS = (
    "the feature store holds no thumbnails; to add them, run onceover extract again with --thumbnails and its other "
    "options as before, then onceover fit"
)


class ReportError(OnceoverError):
    """A report that cannot be made of what was named, or cannot be written where it should be."""


class AbsentError(OnceoverError):
    """A part of a report for which a file is missing; the message says how to make it."""


@dataclass(frozen=True)
class ReportFiles:
    """A run and what a report shows beside it.

    Attributes:
        provenance: the contents of ``run.json``.
        store: the run's feature store, opened; or the reason why it is not.
        others: the embeddings of the runs to compare with, by name. sweep: a sweep's folder.
    """

    run: RunFiles
    provenance: dict
    store: FeatureStore | str
    others: Mapping[str, Embeddings]
    sweep: Path | None

    @cached_property
    def searched(self) -> SearchedSplit:
        """The split that is reported, searched."""
        return SearchedSplit(self.run.embeddings, self.run.split)

    def opened_store(self) -> FeatureStore:
        """The run's store.

        Raises:
            AbsentError: it is not there, or not the run's.
        """
        if isinstance(self.store, str):
            raise AbsentError(self.store)
        return self.store

    def command(self, name: str, *arguments: str) -> str:
        """A command on the run, as it is typed: ``onceover evaluate --run runs/first``."""
        return shlex.join(["onceover", name, "--run", str(self.run.folder), *arguments])


@contextlib.contextmanager
def open_files(
    run: str | Path,
    *,
    split: str | None = None,
    store: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    sweep: str | Path | None = None,
) -> Iterator[ReportFiles]:
    """Opens the files of a report.

    Args:
        split: the split to report; by default the run's reported one.
        store: the new location of the run's store. The one that the run names may be missing; this one may not.
        compare: folders of other runs.

    Raises:
        OnceoverError: what was named is missing or damaged, or of another run.
        ReportError: the run is to be compared with itself.
    """
    for folder in compare:
        if Path(folder).resolve() == Path(run).resolve():
            raise ReportError(f"--compare {folder} names the run that is reported; name another run")
    files = read_run(run, split)
    files.embeddings.split(files.split)  # refuses a split that the run does not have
    provenance = read_record(files.folder / PROVENANCE, "the run's provenance", strict=False)
    others = {str(folder): read_embeddings(Path(folder) / EMBEDDINGS) for folder in compare}
    check_same_split({str(files.folder): files.embeddings, **others}, files.split)
    if sweep:
        read_sweep(sweep)  # refuses one that is missing or damaged
    with contextlib.ExitStack() as stack:
        opened = _open_store(stack, files.embeddings, provenance, store)
        yield ReportFiles(files, provenance, opened, others, Path(sweep) if sweep else None)


def _open_store(
    stack: contextlib.ExitStack, embeddings: Embeddings, provenance: dict, named: str | Path | None
) -> FeatureStore | str:
    """The run's store, opened; or the reason why it is not.

    Raises:
        OnceoverError: the store that was named is missing, damaged, or not the run's.
    """
    path = named or provenance.get("store", "")
    try:
        if not path or not store_exists(named_store(path)):
            raise AbsentError(f"the feature store {path} is not there; name its new place with --store FILE.h5")
        store = stack.enter_context(FeatureStore(path))
        check_store(embeddings, store)
    except OnceoverError as error:
        if named:
            raise
        return str(error)
    return store
