"""Commands that are killed at random moments of their work and started again."""

import random
import signal

from reliability.contents import difference
from reliability.faults import Clean, judge_restart, trial_name
from reliability.trials import EXPECTED_SIGNALS, Verdict, Warm, ending
from reliability.workspace import Workspace
from reliability.writers import Writer


def try_kill(
    warm: Warm, workspace: Workspace, writer: Writer, clean: Clean, seed: int, number: int, archives: tuple = ()
) -> Verdict:
    """Kills a writer at a moment of its work that the seed and the trial's number choose, and starts it again.

    What was there before must still be there, or the new result; the second start must give the uninterrupted result.
    """
    generator = random.Random(f"{seed} {writer.name} {number}")
    kind = EXPECTED_SIGNALS[number % len(EXPECTED_SIGNALS)]
    moment = generator.uniform(0, clean.ended.seconds)
    scratch = writer.start(workspace, trial_name(warm))
    old = writer.values(scratch)
    command = writer.command(workspace, scratch, archives).allowing(clean.ended)
    ended = warm.run(command.but(signals=((int(kind), moment),)))
    where = f"{signal.Signals(kind).name} after {moment:.2f} of {clean.ended.seconds:.2f} s"
    if ended.code not in (0, 130, -int(kind)):
        verdict = ending(ended)
        if verdict is None or verdict.outcome != "error":
            return Verdict("crash", f"{where}: exit code {ended.code}: {ended.stderr[-400:]}")
    values = writer.values(scratch)
    if "unreadable" not in old and not writer.is_whole(values, old, clean.values):
        return Verdict("lost", f"{where}: the old result is gone: {difference(old, values)}")
    verdict = judge_restart(writer, clean, scratch, warm.run(command))
    return Verdict(verdict.outcome, f"{where}: {verdict.detail}") if verdict else Verdict("right", where)
