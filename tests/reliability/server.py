"""A process that has imported the program once and runs command lines in forks of itself.

A command that is ``shared`` runs in a fork that runs many, one after the other; any other one has a fork of its own.

    python -m reliability.server READ WRITE
    python -m reliability.server COMMAND

It reads requests from the file descriptor READ, a line of JSON each, and answers on WRITE with a line of JSON. It does
no arithmetic before it forks, so that a fork behaves like a fresh process. ``trials.py`` starts it and talks to it.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import time
import traceback
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

LIBRARIES = [
    "transformers.models.bert.modeling_bert",
    "torchvision.models",
    "faiss",
    "filelock",
    "sklearn.decomposition",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "safetensors.torch",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.BmpImagePlugin",
    "PIL.WebPImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.MpoImagePlugin",
]


def main() -> None:
    """Imports the program, says so, and answers requests; or runs one command, given as JSON."""
    if len(sys.argv) == 2:
        command = json.loads(sys.argv[1])
        sys.argv = ["cli.py", *command["arguments"]]
        prepare(command)
        sys.exit(call(command["arguments"]) if not command["function"] else call_function(command))
    requests, answers = (int(number) for number in sys.argv[1:3])
    for name in [*program_modules(), *LIBRARIES]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGXFSZ else signal.SIG_DFL)
    with os.fdopen(requests) as incoming, os.fdopen(answers, "w") as outgoing:
        print("{}", file=outgoing, flush=True)
        for line in incoming:
            print(json.dumps(run_all(json.loads(line))), file=outgoing, flush=True)
    os._exit(0)  # libraries that were only imported have nothing to tidy up, and some complain


def program_modules() -> list[str]:
    """The names of all modules of the program."""
    package = importlib.import_module("onceover")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "onceover.")]
    return [name for name in names if not name.endswith(".__main__")]


def run_all(commands: list[dict]) -> list[dict]:
    """Runs commands at the same time, each from its ``start_after`` on, and tells how each of them ended."""
    if len(commands) == 1 and commands[0]["shared"]:
        from reliability.worker import Worker

        return [Worker.run(commands[0])]
    begun = time.monotonic()
    waiting = sorted(range(len(commands)), key=lambda number: commands[number]["start_after"])
    running: dict[int, Child] = {}
    ended: dict[int, dict] = {}
    while waiting or running:
        now = time.monotonic()
        while waiting and now - begun >= commands[waiting[0]]["start_after"]:
            number = waiting.pop(0)
            running[number] = Child(commands[number])
        moments = [child.next_moment() for child in running.values()]
        moments += [begun + commands[number]["start_after"] for number in waiting[:1]]
        poll = select.poll()
        for child in running.values():
            poll.register(child.handle, select.POLLIN)
        poll.poll(1000 * max(0.0, min(moments) - time.monotonic()))
        for number, child in list(running.items()):
            child.act()
            if (report := child.report()) is not None:
                ended[number] = report
                del running[number]
    return [ended[number] for number in range(len(commands))]


def redirect(command: dict) -> None:
    """Lets the standard streams of this process be the command's files."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(command[name], flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)


class Child:
    """One command in a fork, with the signal it is to get and the time it may take."""

    def __init__(self, command: dict):
        self.command = command
        ready, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ready)
            run_child(command, told)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        self.begun = time.monotonic()
        self.handle = os.pidfd_open(self.pid)
        self.deadline = self.begun + command["wait_seconds"]
        self.signals = [(self.begun + moment, number) for number, moment in command["signals"]]
        self.timed_out = False

    def next_moment(self) -> float:
        """When something is to be done about this process next."""
        return min([self.deadline, *(moment for moment, _ in self.signals)])

    def act(self) -> None:
        """Sends the signals whose moment has come; ends a process that has waited too long."""
        now = time.monotonic()
        for moment, number in list(self.signals):
            if now >= moment:
                self.signals.remove((moment, number))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, number)
        if now >= self.deadline:
            self.timed_out = True
            self.deadline = now + 5
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def report(self) -> dict | None:
        """How the process ended; nothing while it runs."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        os.close(self.handle)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # whatever it started and left behind
        return {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - self.begun,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
            "timed_out": self.timed_out,
        }


def run_child(command: dict, told: int) -> None:
    """Runs the command line in this process, which ends with it."""
    code = 70
    try:
        os.setpgid(0, 0)
        redirect(command)
        os.chdir(command["folder"])
        os.environ.update(command["environment"])
        sys.argv = ["cli.py", *command["arguments"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        limit(command)
        prepare(command)
        os.write(told, b".")
        os.close(told)
        code = call(command["arguments"]) if not command["function"] else call_function(command)
        weakref.finalize._exitfunc()  # temporary files go, as at the end of a process
    except BaseException:
        traceback.print_exc()
    finally:
        if command["calls_file"]:
            count_calls(command["calls_file"])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def limit(command: dict) -> None:
    """Bounds processor time, memory and the size of files for this process."""
    seconds = int(command["cpu_seconds"] + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if command["memory"]:
        status = Path("/proc/self/status").read_text()
        data = next(line.split()[1] for line in status.splitlines() if line.startswith("VmData"))
        bound = int(data) * 1024 + command["memory"]
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    if command["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_size"], command["file_size"]))


def prepare(command: dict) -> None:
    """Changes what the trial asks for: where archives are downloaded from, which system call fails."""
    if command["archives"]:
        download = importlib.import_module("onceover.extract.download")
        archives = tuple(download.Archive(*archive) for archive in command["archives"])
        download.ARCHIVES["flickr8k"] = archives
    if command["text_encoder"]:
        make_demo_small(command["text_encoder"])
    for module, _, name in (skipped.partition(":") for skipped in command["skipped"]):
        setattr(importlib.import_module(module), name, lambda *_, **__: [])
    if command["fault"]:
        fault = command["fault"]
        library = ctypes.CDLL(None)
        library.faults_watch(os.fsencode(fault["folder"]))
        if fault["call"]:
            library.faults_set(fault["call"].encode(), fault["errno"], fault["number"], fault["lasting"])


def make_demo_small(text_encoder: str) -> None:
    """Lets the demo draw few images, encode them with small encoders, and fit for few epochs."""
    cli = importlib.import_module("onceover.cli")
    synthetic = importlib.import_module("onceover.extract.synthetic")
    load_config = cli.load_config

    def small_config(*arguments):
        config = load_config(*arguments)
        encoders = {"image_encoder": "torchvision:shufflenet_v2_x0_5@random", "text_encoder": f"hf:{text_encoder}"}
        extract = replace(config.extract, text_layers="last", **encoders)
        return replace(config, extract=extract, training=replace(config.training, num_epochs=2))

    cli.load_config = small_config
    synthetic.draw_dataset = partial(synthetic.draw_dataset, train=16, dev=6, test=6)


def call(arguments: list[str]) -> int:
    """The exit code of a command line, with the traceback of what nothing has caught, as in a process of its own."""
    from onceover.cli import cli

    try:
        cli(arguments, prog_name="onceover")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def call_function(command: dict) -> int:
    """Calls a function of this package, given as MODULE:NAME, with the command's arguments."""
    module, _, name = command["function"].partition(":")
    getattr(importlib.import_module(module), name)(*command["arguments"])
    return 0


def count_calls(file: str) -> None:
    """Writes how often each system call was made below the watched folder."""
    library = ctypes.CDLL(None)
    library.faults_watch(b"")
    names = ["open", "create", "read", "write", "truncate", "allocate", "fsync", "rename", "mkdir", "unlink", "lock"]
    Path(file).write_text(json.dumps({name: library.faults_count(name.encode()) for name in names}))


if __name__ == "__main__":
    main()
