"""A folder with a secret outside it and programs that leave a mark, for malicious files to fail on."""

import os
import pickle
import shutil
from pathlib import Path

from reliability.session import Session
from reliability.trials import Command
from reliability.workspace import FIT

SECRET = b"the secret that no result may hold"
CPU = ("--device", "cpu")
QUERY = ("--query", "a red circle", "--json", *CPU)
Commands = list[tuple]


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Trap:
    """A folder of a trial with a secret outside it, and a mark that only code of the malicious file would leave."""

    def __init__(self, session: Session):
        self.base = session.workspace
        self.session = session
        self.outside = session.scratch()
        self.folder = self.outside / "trial"
        self.folder.mkdir()
        self.mark = self.outside / "mark"
        self.secret = self.outside / "secret.txt"
        self.secret.write_bytes(SECRET)
        self.programs = self.outside / "programs"
        self.programs.mkdir()
        for name in ("gs", "gswin32c", "gswin64c", "djpeg", "latex", "pdflatex", "xelatex"):
            program = self.programs / name
            program.write_text(f"#!/bin/sh\ntouch {self.mark}\n")
            program.chmod(0o755)
        self.yes = self.outside / "yes"
        self.yes.write_text("y\n" * 100)

    def pickle(self) -> bytes:
        """A pickle that leaves the mark."""
        return pickle.dumps({"model": Evil(self.mark)})

    def code(self) -> str:
        """Python that leaves the mark."""
        return f"from pathlib import Path\nPath({str(self.mark)!r}).touch()\nclass Evil: pass\n"

    def sign(self, path: Path) -> None:
        """Makes the checksums of a changed store right again, as whoever made it could."""
        self.session.warm.run(Command((str(path),), function="reliability.traps:sign_store"))

    def copied(self, *names: str) -> None:
        """Copies parts of BASE into the trial's folder."""
        for name in names:
            source, target = self.base.base / name, self.folder / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)


def sign_store(name: str) -> None:
    """Writes the checksums of a store for what it holds now."""
    from onceover.base.hdf5 import sign_hdf5

    sign_hdf5(name)


def fit_command(trap: Trap, store: Path | str) -> tuple:
    """A fit on a store."""
    return ("fit", "--store", store, "--run", trap.folder / "run", *FIT)


def extract_command(trap: Trap, data: Path, *options) -> tuple:
    """An extraction with tiny encoders."""
    return ("extract", "--data", data, "--store", trap.folder / "new.h5", *trap.base.encoders(), *options)
