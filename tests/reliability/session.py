"""What a trial needs: a warmed process, BASE, a server of archives, and clean results to compare with."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from reliability.faults import Clean, NotHere, build_library, run_clean, trial_name
from reliability.trials import Command, Ended, Warm, run_cold
from reliability.workspace import Workspace, build
from reliability.writers import WRITERS, archives_of


class Session:
    """Runs trials. ``no_faults`` is the reason why system calls cannot be made to fail here, or empty."""

    def __init__(self, folder: Path, warm: Warm, address: str, no_faults: str = ""):
        self.warm = warm
        self.workspace: Workspace = build(folder, warm)
        self.address = address
        self.no_faults = no_faults
        self.cold = False
        self._clean: dict[str, Clean] = {}
        self._ended: dict[tuple, Ended] = {}

    def scratch(self) -> Path:
        """An empty folder for the next trial; always the same one, since results hold paths."""
        return self.workspace.scratch(trial_name(self.warm))

    def run(self, command: Command) -> Ended:
        """Runs a command in a process that runs many, or from cold if the session is ``cold``."""
        shared = not command.environment  # which has to be there before the program is imported
        return run_cold(command) if self.cold else self.warm.run(command.but(shared=shared))

    def once(self, command: Command) -> Ended:
        """How the command ends, run the first time it is asked for, with time to do so."""
        key = command.arguments
        if key not in self._ended:
            self._ended[key] = self.warm.run(command.but(cpu_seconds=600, wait_seconds=1200))
        return self._ended[key]

    def clean(self, name: str) -> Clean:
        """A writer's uninterrupted run."""
        if name not in self._clean:
            self._clean[name] = run_clean(self.warm, self.workspace, WRITERS[name], self.archives(name))
        return self._clean[name]

    def archives(self, name: str) -> tuple:
        """The archives for ``download``, none for other writers."""
        return archives_of(self.workspace, self.address) if name == "download" else ()


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def open_session(folder: Path) -> Iterator[Session]:
    """A session whose files lie in ``folder``; BASE is made there unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    no_faults = ""
    library = None
    try:
        library = build_library(folder, str(os.getpid()))
    except NotHere as reason:
        no_faults = str(reason)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with Warm(folder, library) as warm:
            yield Session(folder, warm, f"http://127.0.0.1:{server.server_port}", no_faults)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
