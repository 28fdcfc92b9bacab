"""System calls that fail at a chosen moment, full disks, bounds on file sizes: what a writer makes of each."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reliability.contents import Snapshot, difference, leftovers
from reliability.trials import Command, Ended, Verdict, Warm, classify
from reliability.workspace import Workspace
from reliability.writers import Writer

SOURCE = Path(__file__).with_name("faults.c")


@dataclass(frozen=True)
class Fault:
    """A class of system calls and the error that one of them ends with; ``lasting``: and all that follow."""

    call: str
    error: str
    lasting: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.error} from {self.call}{', lasting' if self.lasting else ''}"


FAULTS = (
    Fault("open", "EACCES"),
    Fault("open", "EIO"),
    Fault("create", "ENOSPC"),
    Fault("create", "EACCES"),
    Fault("read", "EIO"),
    Fault("write", "EIO"),
    Fault("write", "ENOSPC"),
    Fault("write", "ENOSPC", lasting=True),
    Fault("truncate", "ENOSPC"),
    Fault("allocate", "ENOSPC"),
    Fault("fsync", "EIO"),
    Fault("fsync", "EINVAL"),
    Fault("rename", "EACCES"),
    Fault("mkdir", "EACCES"),
    Fault("unlink", "EACCES"),
    Fault("lock", "ENOLCK"),
)


class NotHere(Exception):
    """This machine cannot inject faults; its text is the reason."""


def build_library(folder: Path, name: str = "") -> Path:
    """Compiles the library that makes system calls fail.

    Raises:
        NotHere: no compiler, or a system that does not preload libraries.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotHere("no C compiler")
    library = folder / f"faults{name}.so"
    built = subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], capture_output=True, text=True
    )
    if built.returncode:
        raise NotHere(f"the compiler refuses: {built.stderr.splitlines()[0]}")
    probe = "import ctypes; ctypes.CDLL(None).faults_count(b'read')"
    loaded = subprocess.run(["python3", "-c", probe], env=os.environ | {"LD_PRELOAD": str(library)})
    if loaded.returncode:
        raise NotHere("libraries are not preloaded")
    return library


@dataclass(frozen=True)
class Clean:
    """A writer's uninterrupted run: its result, how it ended, and its system calls by class."""

    values: dict
    ended: Ended
    calls: dict[str, int]


def run_clean(warm: Warm, workspace: Workspace, writer: Writer, archives: tuple = ()) -> Clean:
    """Runs a writer without faults and counts its system calls.

    Raises:
        RuntimeError: it did not end well.
    """
    scratch = writer.start(workspace, trial_name(warm))
    calls_file = warm.scratch / "calls.json"
    calls_file.unlink(missing_ok=True)
    fault = {"folder": str(scratch), "call": ""}
    command = writer.command(workspace, scratch, archives).but(cpu_seconds=600, wait_seconds=1200)
    ended = warm.run(command.but(fault=fault, calls_file=str(calls_file)))
    if ended.code:
        raise RuntimeError(f"{writer.name} does not work: {ended.stderr[-1000:]}")
    calls = json.loads(calls_file.read_text()) if calls_file.exists() else {}
    return Clean(writer.values(scratch), ended, calls)


def trial_name(warm: Warm) -> str:
    """The name of the one folder in which a warmed process' trials work, since results hold paths."""
    return f"trial-{warm.scratch.name}"


def positions(calls: int, count: int, seed: int) -> list[int]:
    """Numbers of calls, half of them in the last tenth, where results are sealed and swapped."""
    if calls == 0:
        return []
    generator = random.Random(seed)
    late = [generator.randint(max(1, calls - calls // 10), calls) for _ in range((count + 1) // 2)]
    return late + [generator.randint(1, calls) for _ in range(count // 2)]


def try_fault(
    warm: Warm, workspace: Workspace, writer: Writer, clean: Clean, fault: Fault, number: int, archives: tuple = ()
) -> Verdict:
    """Lets a writer's ``number``-th call fail, then runs it again without a fault."""
    scratch = writer.start(workspace, trial_name(warm))
    injected = {
        "folder": str(scratch),
        "call": fault.call,
        "errno": getattr(errno, fault.error),
        "number": number,
        "lasting": int(fault.lasting),
    }
    command = writer.command(workspace, scratch, archives).allowing(clean.ended)
    return judge_failure(
        warm, writer, clean, scratch, command.but(fault=injected), command, must_succeed=fault.error == "EINVAL"
    )


def try_file_size(warm: Warm, workspace: Workspace, writer: Writer, clean: Clean, size: int, archives=()) -> Verdict:
    """Runs a writer that may write files of ``size`` bytes at most, then without a bound."""
    scratch = writer.start(workspace, trial_name(warm))
    command = writer.command(workspace, scratch, archives).allowing(clean.ended)
    return judge_failure(warm, writer, clean, scratch, command.but(file_size=size), command)


def try_read_only(warm: Warm, workspace: Workspace, writer: Writer, clean: Clean, archives: tuple = ()) -> Verdict:
    """Runs a writer on a folder that is mounted read-only, then on one that is not.

    Raises:
        NotHere: no file system can be mounted.
    """
    scratch = workspace.scratch(trial_name(warm))
    with small_disk(scratch) as resize:
        (scratch / "tmp").mkdir()
        writer.prepare(workspace, scratch)
        subprocess.run(["mount", "-o", "remount,ro", str(scratch)], check=True)
        command = writer.command(workspace, scratch, archives).allowing(clean.ended)
        before = Snapshot(scratch)
        old = writer.values(scratch)
        verdict = judge_end(writer, clean, scratch, before, old, warm.run(command))
        subprocess.run(["mount", "-o", "remount,rw", str(scratch)], check=True)
        resize(2**30)
        return verdict if verdict.is_fault else judge_restart(writer, clean, scratch, warm.run(command)) or verdict


def judge_failure(
    warm: Warm,
    writer: Writer,
    clean: Clean,
    scratch: Path,
    failing: Command,
    command: Command,
    must_succeed: bool = False,
) -> Verdict:
    """Runs the failing command and then the same without the fault, and says what became of files and results."""
    before = Snapshot(scratch)
    old = writer.values(scratch)
    verdict = judge_end(writer, clean, scratch, before, old, warm.run(failing))
    if verdict.is_fault:
        return verdict
    if must_succeed and verdict.outcome != "right":
        return Verdict("refused", verdict.detail)
    return judge_restart(writer, clean, scratch, warm.run(command)) or verdict


def judge_end(writer: Writer, clean: Clean, scratch: Path, before: Snapshot, old: dict, ended: Ended) -> Verdict:
    """What a failing command has left: the right result, or one line and the old result as it was."""

    def differs() -> str:
        # a file that could not be read is in the ledger, and tried again by the next command
        return "" if "left out: " in ended.stderr else difference(clean.values, writer.values(scratch))

    replaced = ended.code != 0 and writer.is_whole(writer.values(scratch), old, clean.values)
    judged = classify(ended, differs, None, (), lambda: "left out: " in ended.stderr)
    if judged.is_fault:
        return judged
    # a complete new run is at hand, and the next command on the folder puts it into place
    replaced = replaced or any((path / ".swap").is_dir() for path in writer.paths(scratch))
    outputs = writer.paths(scratch) if ended.code == 0 or replaced else (scratch / "tmp",)
    if changed := before.changes(outputs):
        return Verdict("lost", f"{changed}; {ended.stderr[-200:]}")
    if left := leftovers(scratch):
        return Verdict("lost", f"left over: {', '.join(left)}; {ended.stderr[-200:]}")
    return judged


def judge_restart(writer: Writer, clean: Clean, scratch: Path, again: Ended) -> Verdict | None:
    """What speaks against a command that was run again after it had failed or been killed; nothing if all is well."""
    differs = difference(clean.values, writer.values(scratch))
    if again.code and (differs or len(again.error_lines()) != 1):  # a whole result may be refused a second time
        return Verdict("lost", f"does not go on: {again.stderr[-300:]}")
    if differs:
        return Verdict("silent difference", f"of the command after the fault: {differs}")
    if left := leftovers(scratch):
        return Verdict("lost", f"left over after the second command: {', '.join(left)}")
    return None


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int], None]]:
    """Mounts a file system at an empty folder, and gives a call that changes its size in bytes.

    Raises:
        NotHere: only root may mount one, and not everywhere.
    """
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise NotHere("file systems cannot be mounted here")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def try_small_disk(warm: Warm, workspace: Workspace, writer: Writer, clean: Clean, size: int, archives=()) -> Verdict:
    """Runs a writer where ``size`` bytes are free, makes room, and runs the writer again.

    Raises:
        NotHere: no file system can be mounted.
    """
    scratch = workspace.scratch(trial_name(warm))
    with small_disk(scratch) as resize:
        (scratch / "tmp").mkdir()
        writer.prepare(workspace, scratch)
        used = sum(path.lstat().st_blocks * 512 for path in scratch.rglob("*"))
        resize(used + size)
        command = writer.command(workspace, scratch, archives).allowing(clean.ended)
        before = Snapshot(scratch)
        old = writer.values(scratch)
        verdict = judge_end(writer, clean, scratch, before, old, warm.run(command))
        resize(2**30)
        return verdict if verdict.is_fault else judge_restart(writer, clean, scratch, warm.run(command)) or verdict
