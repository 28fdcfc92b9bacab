"""A fork of the warmed process that runs many commands, one after the other."""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import weakref

from reliability.server import call, call_function, limit, prepare, redirect

COMMANDS_EACH = 40  # that a fork runs before another takes its place


class Worker:
    """A fork that runs many commands; after some of them, or after one that ended it, another takes its place."""

    current: "Worker | None" = None

    def __init__(self):
        reading, self.requests = os.pipe()
        self.answers, writing = os.pipe()
        self.commands = 0
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.requests)
            os.close(self.answers)
            serve(reading, writing)
        os.close(reading)
        os.close(writing)

    @classmethod
    def run(cls, command: dict) -> dict:
        """How a command ended."""
        if cls.current is None:
            cls.current = Worker()
        worker = cls.current
        worker.commands += 1
        report = worker.ask(command)
        if report["code"] < 0 or report["timed_out"] or worker.commands >= COMMANDS_EACH:
            worker.end()
            cls.current = None
        return report

    def ask(self, command: dict) -> dict:
        """Has the fork run a command and waits for it, or for the fork's end."""
        begun = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            os.write(self.requests, json.dumps(command).encode() + b"\n")
        poll = select.poll()
        poll.register(self.answers, select.POLLIN)
        timed_out = not poll.poll(1000 * command["wait_seconds"])
        line = b"" if timed_out else os.read(self.answers, 2**16)
        if line:
            return json.loads(line) | {"timed_out": False}
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL if timed_out else 0)
        _, status, usage = os.wait4(self.pid, 0)
        self.pid = 0
        return {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - begun,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
            "timed_out": timed_out,
        }

    def end(self) -> None:
        """Ends the fork."""
        os.close(self.requests)
        os.close(self.answers)
        if self.pid:
            os.waitpid(self.pid, 0)


def serve(requests: int, answers: int) -> None:
    """Runs commands in this process, one after the other, until there are no more."""
    os.setpgid(0, 0)
    incoming = os.fdopen(requests)
    bounded = False
    for line in incoming:
        command = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        begun = time.monotonic()
        redirect(command)
        os.chdir(command["folder"])
        os.environ.update(command["environment"])
        sys.argv = ["cli.py", *command["arguments"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        spent = used.ru_utime + used.ru_stime
        limit(command | {"cpu_seconds": spent + command["cpu_seconds"], "memory": 0 if bounded else command["memory"]})
        bounded = True
        prepare(command)
        code = call(command["arguments"]) if not command["function"] else call_function(command)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        after = resource.getrusage(resource.RUSAGE_SELF)
        report = {"code": code, "seconds": time.monotonic() - begun, "peak_bytes": after.ru_maxrss * 1024}
        report["cpu_seconds"] = after.ru_utime + after.ru_stime - spent
        os.write(answers, json.dumps(report).encode() + b"\n")
    weakref.finalize._exitfunc()
    os._exit(0)
