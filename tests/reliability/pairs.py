"""Two commands at once: every writer beside itself, and readers while something is written."""

import random
from collections.abc import Callable
from pathlib import Path

from reliability.contents import difference, json_lines, leftovers
from reliability.faults import Clean, trial_name
from reliability.trials import Command, Verdict, Warm, ending
from reliability.workspace import Workspace
from reliability.writers import WRITERS, Writer

QUERY = ("--query", "a red circle above a blue square", "--json", "--device", "cpu")
#: writer -> a reader of what it writes; each gives JSON, or text of which only the end matters
READERS: dict[str, Callable[[Workspace, Path], tuple]] = {
    "extract --force": lambda base, to: ("verify", to / "s.h5"),
    "fit --force": lambda base, to: ("search", "--run", to / "run", *QUERY),
    "index --images": lambda base, to: ("search", "--run", base.run, "--index", to / "index", *QUERY),
    "evaluate": lambda base, to: ("search", "--run", to / "run", *QUERY),
    "sweep": lambda base, to: ("plot", "--sweep", to / "sweep", "--out", to / "figures"),
}


def try_twice_at_once(
    warm: Warm, workspace: Workspace, writer: Writer, clean: Clean, seed: int, number: int, archives: tuple = ()
) -> Verdict:
    """Runs a writer twice at once: one wins and the other says so in one line, or both are right."""
    generator = random.Random(f"{seed} {writer.name} {number}")
    delay = generator.choice([0.0, generator.uniform(0, clean.ended.seconds)])
    scratch = writer.start(workspace, trial_name(warm))
    command = writer.command(workspace, scratch, archives).allowing(clean.ended)
    both = warm.run_together([command, command.but(start_after=delay)])
    verdicts = [ending(ended) or Verdict("right") for ended in both]
    for verdict, ended in zip(verdicts, both, strict=True):
        if verdict.is_fault:
            return Verdict(verdict.outcome, f"the second {delay:.2f} s later: {verdict.detail} {ended.stderr[-200:]}")
    if all(verdict.outcome == "error" for verdict in verdicts):
        return Verdict("lost", f"neither has won: {verdicts[0].detail}; {verdicts[1].detail}")
    if differs := difference(clean.values, writer.values(scratch)):
        return Verdict("silent difference", differs)
    if left := leftovers(scratch):
        return Verdict("lost", f"left over: {', '.join(left)}")
    return Verdict("error" if any(verdict.outcome == "error" for verdict in verdicts) else "right")


def try_reader(warm: Warm, workspace: Workspace, name: str, clean: Clean, seed: int, number: int) -> Verdict:
    """Reads again and again while a writer replaces what is read: old or new results, or one line."""
    generator = random.Random(f"{seed} {name} reader {number}")
    writer = WRITERS[name]
    scratch = writer.start(workspace, trial_name(warm))
    options = tuple(str(part) for part in READERS[name](workspace, scratch))
    reader = Command(options, folder=str(scratch)).allowing(clean.ended)
    old = warm.run(reader)
    starts = [generator.uniform(0, clean.ended.seconds) for _ in range(4)]
    commands = [writer.command(workspace, scratch).allowing(clean.ended)]
    commands += [reader.but(start_after=start) for start in starts]
    written, *readings = warm.run_together(commands)
    if (verdict := ending(written)) and verdict.outcome != "error":
        return Verdict(verdict.outcome, f"of the writer: {verdict.detail}")
    new = warm.run(reader)
    allowed = [json_lines(ended.stdout) for ended in (old, new)] if "--json" in options else []
    for start, ended in zip(starts, readings, strict=True):
        verdict = ending(ended)
        if verdict and verdict.is_fault:
            return Verdict(verdict.outcome, f"of the reader after {start:.2f} s: {verdict.detail}")
        if verdict is None and allowed and json_lines(ended.stdout) not in allowed:
            return Verdict("silent difference", f"of the reader after {start:.2f} s: neither old nor new")
    return Verdict("right")
