"""Puts the sections of a report together and writes it; a section whose files are missing says how to make them."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from onceover.analysis.figures import drawings_of
from onceover.analysis.pages import render
from onceover.analysis.report.figures import PLACED, drawing_of, other_figures, sweep
from onceover.analysis.report.files import NO_THUMBNAILS, ReportError, ReportFiles
from onceover.analysis.report.health import health
from onceover.analysis.report.hubs import hubs
from onceover.analysis.report.map_section import map_section
from onceover.analysis.report.overview import details, overview
from onceover.analysis.report.queries import best_captions, best_images, worst_captions, worst_images
from onceover.analysis.report.results import comparison, evaluation, rank_bands
from onceover.base.errors import OnceoverError
from onceover.base.formats import ERRORS, PROVENANCE
from onceover.base.outputs import Outputs
from onceover.base.progress import ProgressBar, say

QUERIES = 6  # best and worst ones shown of each direction
_SUFFIXES = (".html", ".htm")


class Section(NamedTuple):
    """A section: its anchor, its title, and the function that makes what its template ``report_<anchor>.html`` shows.

    A section of which the function raises an ``OnceoverError`` shows that instead.
    """

    anchor: str
    title: str
    make: Callable[[ReportFiles], dict[str, Any]]


class Written(NamedTuple):
    """A section as its template takes it: values, or the note that stands in their place."""

    anchor: str
    title: str
    values: dict[str, Any]
    note: str | None


def _queries(files: ReportFiles) -> dict[str, Any]:
    searched = files.searched
    return {
        "correction": searched.correction,
        "best_captions": best_captions(searched, QUERIES),
        "worst_captions": worst_captions(searched, QUERIES),
        "best_images": best_images(searched, QUERIES),
        "worst_images": worst_images(searched, QUERIES),
        "note": NO_THUMBNAILS if files.run.embeddings.thumbnails is None else None,
    }


def _results(files: ReportFiles) -> dict[str, Any]:
    return evaluation(files) | drawing_of(files, "models")


def _ranks(files: ReportFiles) -> dict[str, Any]:
    return rank_bands(files) | drawing_of(files, "ranks")


def sections_of(files: ReportFiles) -> list[Section]:
    """The sections of a report; comparisons and a sweep where they were named, and figures of other packages."""
    sections = [Section("run", "What was run", overview), Section("results", "Results", _results)]
    if files.others:
        sections.append(Section("comparison", "Comparison", comparison))
    sections += [
        Section("map", "Map", map_section),
        Section("queries", "Best and worst queries", _queries),
        Section("hubs", "Hubs", hubs),
        Section("ranks", "Ranks", _ranks),
        Section("similarity", "Similarity", partial(drawing_of, name="similarity-ordered")),
        Section("training", "Training", partial(drawing_of, name="training")),
    ]
    if files.sweep is not None:
        sections.append(Section("sweep", "Sweep", sweep))
    sections.append(Section("health", "Health of the feature store", health))
    if set(drawings_of("run", files.run)) - set(PLACED):
        sections.append(Section("figures", "More figures", other_figures))
    sections.append(Section("details", "Settings and provenance", details))
    return sections


def check_report(out: str | Path) -> None:
    """Refuses a file that could not be written, before the work for it is done.

    Raises:
        ReportError: it is named as no page, or as a run's page of errors.
        OutputError: a file of somebody else's is there.
    """
    out = Path(out)
    if fnmatchcase(out.name, ERRORS.format("*")) and (out.parent / PROVENANCE).is_file():
        raise ReportError(f"{out} is the name of the run's page of errors; name another file for the report")
    if out.suffix.lower() not in _SUFFIXES:
        raise ReportError(f"{out} is not named as a page; name a file that ends in .html")
    _outputs(out).check(out.name)


def write_report(files: ReportFiles, out: str | Path) -> Path:
    """Writes the report of a run as one HTML file that needs nothing else; returns its path.

    Raises:
        ReportError, OutputError: as ``check_report``.
    """
    out = Path(out)
    check_report(out)
    _outputs(out).write_texts({out.name: report_page(files)})
    return out


def report_page(files: ReportFiles) -> str:
    """The report of a run as HTML."""
    run = files.run
    sections = sections_of(files)
    written = []
    with ProgressBar("report", "sections", total=len(sections)) as bar:
        for section in sections:
            written.append(_written(section, files))
            bar.update()
    damage = files.searched.damage()
    if damage:
        say(damage)
    images, captions, _ = run.embeddings.split(run.split)
    return render(
        "report.html",
        name=str(run.folder),
        split=run.split,
        n_images=len(images),
        n_captions=len(captions),
        sections=written,
        damage=damage,
    )


def _written(section: Section, files: ReportFiles) -> Written:
    """A section with its values, or with a note on what is missing."""
    try:
        return Written(section.anchor, section.title, section.make(files), None)
    except OnceoverError as error:
        say(f"left out: {section.title}: {error}")
        return Written(section.anchor, section.title, {}, str(error))


def _outputs(out: Path) -> Outputs:
    return Outputs(out.parent, "name another file for the report")
