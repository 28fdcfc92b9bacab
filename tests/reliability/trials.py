"""Runs command lines, in forks of a warmed process or from cold, and says how each of them ended."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from reliability.contents import Snapshot, leftovers

ROOT = Path(__file__).resolve().parents[2]
MORE_CPU_SECONDS = 10.0  # beyond the clean command: a hang
MORE_WAIT_SECONDS = 60.0
MEMORY = 3 * 2**30  # bytes a command may take beyond what the imports take
FAULTS = ("traceback", "crash", "silent difference", "lost", "refused", "let in", "hang", "grows")
OUTCOMES = ("right", "error", "ledger", *FAULTS)
EXPECTED_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
UNEXPECTED = ("Traceback (most recent call last)", "error: unexpected", "Fatal Python error")


@dataclass(frozen=True)
class Command:
    """A command line of the program and the conditions under which it runs."""

    arguments: tuple[str, ...]
    folder: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    stdin: str = "/dev/null"
    cpu_seconds: float = MORE_CPU_SECONDS
    wait_seconds: float = MORE_WAIT_SECONDS
    memory: int = MEMORY
    file_size: int = 0
    archives: tuple = ()
    text_encoder: str = ""
    fault: dict | None = None
    signals: tuple[tuple[int, float], ...] = ()
    start_after: float = 0.0
    calls_file: str = ""
    function: str = ""
    skipped: tuple[str, ...] = ()
    shared: bool = False

    def but(self, **changes) -> "Command":
        """The same command under other conditions."""
        return replace(self, **changes)

    def allowing(self, clean: "Ended") -> "Command":
        """The same command with the time that a hang is defined by: that of the clean command and some more."""
        return replace(
            self,
            cpu_seconds=clean.cpu_seconds + MORE_CPU_SECONDS,
            wait_seconds=clean.seconds + MORE_WAIT_SECONDS,
        )


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal, what it printed, and what it took."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0
    timed_out: bool = False

    def error_lines(self) -> list[str]:
        """The lines on stderr that begin with "error: "."""
        return [line for line in shown_lines(self.stderr) if line.startswith("error: ")]


@dataclass(frozen=True)
class Verdict:
    """An outcome, one of ``OUTCOMES``, and what speaks for it."""

    outcome: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether the program has done what it must never do."""
        return self.outcome in FAULTS


class Warm:
    """A process that has imported the program, and forks for each command; a context manager.

    ``preload``: a shared library that is loaded into it, as ``faults.py`` builds one.
    """

    def __init__(self, scratch: Path, preload: Path | None = None):
        self.scratch = Path(tempfile.mkdtemp(prefix="output-", dir=scratch))
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
        environment |= {"PYTHONPATH": python_path(), "PYTHONFAULTHANDLER": "1"}
        environment |= {"LD_PRELOAD": str(preload)} if preload else {}
        for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
            del environment[name]
        there, outgoing = os.pipe()
        incoming, back = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "reliability.server", str(there), str(back)],
            cwd=ROOT,
            env=environment,
            pass_fds=(there, back),
            start_new_session=True,
        )
        os.close(there)
        os.close(back)
        self._requests = os.fdopen(outgoing, "w")
        self._answers = os.fdopen(incoming)
        self._answer()

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._requests.close()
        self._process.wait()
        self._answers.close()

    def run(self, command: Command) -> Ended:
        """Runs one command."""
        return self.run_together([command])[0]

    def run_together(self, commands: list[Command]) -> list[Ended]:
        """Runs commands at the same time, each from its ``start_after`` on."""
        requests = []
        for number, command in enumerate(commands):
            files = {name: str(self.scratch / f"{name}-{number}") for name in ("stdout", "stderr")}
            requests.append(asdict(command) | files)
        print(json.dumps(requests), file=self._requests, flush=True)
        return [
            Ended(stdout=read_lossy(request["stdout"]), stderr=read_lossy(request["stderr"]), **report)
            for request, report in zip(requests, self._answer(), strict=True)
        ]

    def _answer(self) -> list[dict]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the warmed process ended with exit code {self._process.wait()}")
        return json.loads(line)


def python_path() -> str:
    """Where Python looks for modules: the tests' folder, too."""
    return os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def run_cold(command: Command) -> Ended:
    """Runs a command in a process of its own, from the start of Python on. Failing system calls are not for it."""
    begun = time.monotonic()
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment |= {"PYTHONPATH": python_path()}
    program = [str(ROOT / "cli.py"), *command.arguments]
    if command.archives or command.text_encoder or command.skipped or command.function:
        program = ["-m", "reliability.server", json.dumps(asdict(command))]
    with open(command.stdin, "rb") as stdin:
        process = subprocess.Popen(
            [sys.executable, *program],
            cwd=command.folder,
            env=environment | command.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        timed_out = False
        try:
            output, errors = process.communicate(timeout=command.wait_seconds + 30)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            timed_out = True
    texts = (text.decode(errors="backslashreplace") for text in (output, errors))
    return Ended(process.returncode, *texts, time.monotonic() - begun, 0.0, timed_out=timed_out)


def read_lossy(path: str | Path) -> str:
    """A file's text, whatever its bytes."""
    return Path(path).read_text(encoding="utf-8", errors="backslashreplace")


def shown_lines(text: str) -> list[str]:
    """The lines of a terminal's text; a progress bar draws over itself with carriage returns."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def ending(ended: Ended) -> Verdict | None:
    """The verdict that the way a command ended allows by itself: a hang, a crash, a traceback, an error of one line.

    Nothing for a command that ended well, whose result has to be looked at.
    """
    if ended.timed_out or ended.code == -signal.SIGXCPU:
        return Verdict("hang", f"{ended.seconds:.0f} s, {ended.cpu_seconds:.0f} s of CPU")
    if any(mark in ended.stderr for mark in UNEXPECTED):
        return Verdict("traceback", " / ".join(shown_lines(ended.stderr)[-3:])[-600:])
    if ended.code < 0 or ended.code > 128:
        return Verdict("crash", f"exit code {ended.code}: {ended.stderr[-300:]}")
    if ended.code == 0:
        return None
    lines = ended.error_lines()
    usage = ended.code == 2 and any(line.startswith("Error: ") for line in shown_lines(ended.stderr))
    if ended.code in (1, 2) and (len(lines) == 1 or usage):
        return Verdict("error", lines[0][:300] if lines else shown_lines(ended.stderr)[-1][:300])
    if ended.code == 1 and not lines and "wrong: " in ended.stdout:
        return Verdict("error", shown_lines(ended.stdout)[0][:300])  # verify's findings are its result
    return Verdict("traceback", f"exit code {ended.code} without one line: {ended.stderr[-300:]}")


def classify(
    ended: Ended,
    difference: Callable[[], str],
    before: Snapshot | None = None,
    outputs: tuple[Path, ...] = (),
    ledger: Callable[[], bool] = lambda: False,
) -> Verdict:
    """How a command ended, with a look at its result and at the files that were there before.

    Args:
        difference: says in what the result differs from the clean one, nothing where it is equal.
        before: the files that were there; they must all be as they were, but for the ``outputs`` of a command that
            ended well.
        ledger: whether the result has recorded failures.
    """
    verdict = ending(ended)
    if verdict and verdict.outcome != "error":
        return verdict
    if before is not None:
        changed = before.changes(outputs if verdict is None else ())
        if changed:
            return Verdict("lost", f"{changed}; {ended.stderr[-200:]}")
        left = leftovers(before.folder)
        if left:
            return Verdict("lost", f"left over: {', '.join(left)}; {ended.stderr[-200:]}")
    if verdict:
        return verdict
    differs = difference()
    if differs:
        return Verdict("silent difference", differs[:600])
    return Verdict("ledger" if ledger() else "right")
