"""The commands that write, each on the smallest input, with what its result is compared by."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reliability import contents
from reliability.trials import Command
from reliability.workspace import FIT, GRID, TUNE, Workspace


def nothing(workspace: Workspace, scratch: Path) -> None:
    """Prepares nothing."""


@dataclass(frozen=True)
class Writer:
    """A writing command: its options, what has to be there before, and the values of its result.

    ``outputs`` are names in the trial's folder, the result's own first. A result in ``parts`` is replaced one part
    after the other: the first words of its values' names say which part they belong to.
    """

    name: str
    options: Callable[[Workspace, Path], tuple]
    outputs: tuple[str, ...]
    read: Callable[[Path], dict]
    prepare: Callable[[Workspace, Path], None] = nothing
    parts: bool = False
    slow: bool = False

    def command(self, workspace: Workspace, scratch: Path, archives: tuple = ()) -> Command:
        """The command line that writes into ``scratch``."""
        arguments = tuple(str(part) for part in self.options(workspace, scratch))
        environment = {"TMPDIR": str(scratch / "tmp")}
        text_encoder = str(workspace.bert) if self.name == "demo" else ""
        return Command(
            arguments, folder=str(scratch), environment=environment, archives=archives, text_encoder=text_encoder
        )

    def start(self, workspace: Workspace, name: str) -> Path:
        """A trial's folder with all that the command needs."""
        scratch = workspace.scratch(name)
        (scratch / "tmp").mkdir()
        self.prepare(workspace, scratch)
        return scratch

    def values(self, scratch: Path) -> dict:
        """What the command has written; nothing where there is no whole result."""
        try:
            return self.read(scratch / self.outputs[0])
        except (OSError, ValueError, KeyError) as error:
            return {"unreadable": f"{type(error).__name__}: {error}"}

    def is_whole(self, values: dict, old: dict, new: dict) -> bool:
        """Whether values are the old result or the new one, or of each of its parts the old or the new one."""
        names = values.keys() | old.keys() | new.keys()
        for part in {name.partition(" ")[0] if self.parts else "" for name in names}:
            kinds = [
                {name: value for name, value in content.items() if not self.parts or name.partition(" ")[0] == part}
                for content in (values, old, new)
            ]
            if kinds[0] not in kinds[1:]:
                return False
        return True

    def paths(self, scratch: Path) -> tuple[Path, ...]:
        """Where the command writes."""
        return tuple(scratch / output for output in (*self.outputs, "tmp"))


def fit_options(workspace: Workspace, scratch: Path) -> tuple:
    """The options of a fit."""
    return ("fit", "--store", workspace.store, "--run", scratch / "run", *FIT)


def copied(*names: str) -> Callable[[Workspace, Path], None]:
    """Prepares a trial with copies of some of BASE; ``source:name`` gives a copy another name."""

    def prepare(workspace: Workspace, scratch: Path) -> None:
        for name in names:
            source, _, target = name.partition(":")
            path = workspace.base / source
            if path.is_dir():
                shutil.copytree(path, scratch / (target or source))
            else:
                shutil.copy2(path, scratch / (target or source))

    return prepare


def sentences(workspace: Workspace, scratch: Path) -> None:
    """Prepares a file of captions to index."""
    (scratch / "captions.txt").write_text("a red circle\na blue square above a ring\na star\n")


def index_of_images(workspace: Workspace, scratch: Path) -> None:
    """Prepares an index of images that is to be indexed again after two images are gone and one has come."""
    shutil.copytree(workspace.data / "images", scratch / "images")
    shutil.copytree(workspace.folder_index, scratch / "index")
    shutil.copy2(workspace.query, scratch / "images" / "query.jpg")


def archives_of(workspace: Workspace, address: str) -> tuple:
    """The archives to download, as the trial's server offers them at ``address``."""
    proofs = {workspace.archive: "Flicker8k_Dataset", workspace.texts: "Flickr8k.token.txt"}
    return tuple(
        (f"{address}/base/{path.name}", hashlib.md5(path.read_bytes()).hexdigest(), proof)
        for path, proof in proofs.items()
    )


CPU = ("--device", "cpu")
WRITERS = {
    writer.name: writer
    for writer in (
        Writer(
            "extract",
            lambda base, to: (
                *("extract", "--data", base.data / "captions.csv", "--store", to / "s.h5", "--limit", 10),
                *base.encoders(),
            ),
            ("s.h5", "s.h5.parts"),
            contents.store_of_extraction,
        ),
        Writer(
            "extract --force",
            lambda base, to: (
                *("extract", "--data", base.data / "captions.csv", "--store", to / "s.h5", "--force"),
                *base.encoders(2),
            ),
            ("s.h5", "s.h5.parts"),
            contents.store_of_extraction,
            copied("s.h5"),
            slow=True,
        ),
        Writer(
            "import",
            lambda base, to: (
                *("import", "--image-features", base.imported / "images.npy"),
                *("--text-features", base.imported / "texts.npy", "--captions", base.imported / "captions.csv"),
                *("--store", to / "i.h5"),
            ),
            ("i.h5", "i.h5.parts"),
            contents.store_of_extraction,
        ),
        Writer("fit", fit_options, ("run",), contents.run_values),
        Writer(
            "fit --force",
            lambda base, to: (*fit_options(base, to), "--force", "--set", "training.seed=3"),
            ("run",),
            contents.run_values,
            copied("run"),
        ),
        Writer(
            "sweep",
            lambda base, to: ("sweep", "--store", base.store, "--out", to / "sweep", *GRID, *FIT),
            ("sweep",),
            contents.sweep_values,
        ),
        Writer(
            "finetune",
            lambda base, to: (
                *("finetune", "--run", base.run, "--data", base.data / "captions.csv", "--store", base.store),
                *("--out", to / "tuned", *TUNE),
            ),
            ("tuned", "activations"),
            contents.tuned_values,
            slow=True,
        ),
        Writer(
            "ensemble",
            lambda base, to: ("ensemble", base.run, base.other_run, "--out", to / "run"),
            ("run",),
            contents.run_values,
        ),
        Writer(
            "index",
            lambda base, to: ("index", "--run", base.run, "--index", to / "index", *CPU),
            ("index",),
            contents.index_values,
            parts=True,
        ),
        Writer(
            "index --captions",
            lambda base, to: (
                *("index", "--run", base.run, "--captions", to / "captions.txt", "--index", to / "index"),
                *CPU,
            ),
            ("index",),
            contents.index_values,
            sentences,
            parts=True,
        ),
        Writer(
            "index --images",
            lambda base, to: (
                *("index", "--run", base.run, "--images", to / "images", "--index", to / "index", "--force"),
                *CPU,
            ),
            ("index",),
            contents.index_values,
            index_of_images,
            parts=True,
        ),
        Writer(
            "evaluate",
            lambda base, to: ("evaluate", "--run", to / "run", *CPU),
            ("run/evaluation-test.json", "run/evaluation-test.md", "run/evaluation-test.csv"),
            contents.evaluation_values,
            copied("run"),
        ),
        Writer(
            "plot",
            lambda base, to: ("plot", "--sweep", base.sweep, "--out", to / "figures"),
            ("figures",),
            contents.figure_names,
            parts=True,
        ),
        Writer(
            "download",
            lambda base, to: ("download", "flickr8k", "--to", to / "data"),
            ("data",),
            contents.archive_values,
            parts=True,
        ),
        Writer(
            "demo",
            lambda base, to: ("demo", "--out", to / "demo", *CPU),
            ("demo",),
            lambda folder: contents.run_values(folder / "run"),
            slow=True,
        ),
    )
}
