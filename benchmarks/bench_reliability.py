"""Does anything get lost, in, or wrong, when inputs are corrupted, system calls fail and commands are killed?

    python benchmarks/bench_reliability.py [AREA ...] --folder DIR [--seed 0] [--count 1000] [--kills 110]
        [--positions 10] [--jobs 2] [--out FILE.jsonl] [--only KIND:NUMBER]

Areas: ``fuzz`` (``--count`` corrupted inputs of each kind, 20 of each from cold), ``hostile`` (malicious files),
``kills`` (``--kills`` in all, spread over the writing commands), ``faults`` (each failing system call at
``--positions`` places, half of them in the last tenth of the calls; full disks; bounded files), ``pairs`` (two at once,
readers during writes), ``again`` (twice the same, with 1 and 2 threads) and ``long`` (memory over hundreds of fits and
a hundred thousand queries). Without an area all are run.

Prints a Markdown table for each area, and the faults with what repeats each: ``--only KIND:NUMBER`` with the same seed
runs exactly that trial. Results go to ``--out`` as they come; run again with the same options, only what is missing
there is tried.
"""

import argparse
import json
import multiprocessing
import queue
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reliability import again, endurance, faults, fuzz, fuzz_inputs, hostile, kills, pairs  # noqa: E402
from reliability.session import Session, open_session  # noqa: E402
from reliability.trials import OUTCOMES, Verdict  # noqa: E402
from reliability.writers import WRITERS  # noqa: E402

AREAS = ("fuzz", "hostile", "kills", "faults", "pairs", "again", "long")
COLD = 20  # trials of each kind from the start of Python on
SIZES = (1000, 8000, 20_000, 60_000, 150_000)  # bytes that a disk or a file may have
ONCE = ("demo", "download")  # faults at one position


@dataclass(frozen=True)
class Task:
    """Trials of one kind that one process runs one after the other."""

    area: str
    kind: str
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """What came of one trial."""

    area: str
    kind: str
    number: int
    outcome: str
    detail: str


def main() -> None:
    """Parses the options, runs the trials, and prints and writes what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=", ".join((*AREAS, *fuzz.ALL_KINDS)))
    parser.add_argument("--folder", type=Path, required=True, help="where BASE and the trials' files go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000, help="corrupted inputs of each kind")
    parser.add_argument("--kills", type=int, default=110)
    parser.add_argument("--positions", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="repeat one trial")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.areas) - {*AREAS, *fuzz.ALL_KINDS}:
        parser.error(f"no such area: {', '.join(sorted(unknown))}")
    options.folder = options.folder.resolve()
    results: list[Result] = []
    try:
        for result in run(options):
            results.append(result)
    except KeyboardInterrupt:
        print("interrupted; what follows is what was done", file=sys.stderr)
    print(report(results, options))
    for result in results:
        if is_fault(result):
            print(f"{result.kind} {result.number}: {result.outcome}: {result.detail}\n  {repeat(result, options)}")
    sys.exit(any(is_fault(result) for result in results))


def is_fault(result: Result) -> bool:
    """Whether a trial has shown a fault of the program."""
    return Verdict(result.outcome).is_fault


def repeat(result: Result, options) -> str:
    """The command that runs a trial again."""
    command = f"python benchmarks/bench_reliability.py --folder DIR --seed {options.seed}"
    return f"{command} --positions {options.positions} --only '{result.kind}:{result.number}'"


def run(options) -> Iterator[Result]:
    """The results of all trials, in ``--jobs`` processes."""
    if options.only:
        kind, _, number = options.only.rpartition(":")
        tasks = [Task(area_of(kind), kind, (int(number),))]
    else:
        tasks = list(plan(options))
    recorded = read_results(options.out)
    for task in tasks:
        yield from recorded.get(task, [])
    tasks = [task for task in tasks if task not in recorded]
    with tqdm(total=sum(len(task.numbers) for task in tasks), unit=" trials", smoothing=0) as bar:
        for task, results in run_tasks(tasks, options):
            if options.out:
                record_results(options.out, task, results)
            bar.update(len(task.numbers))
            bar.set_postfix_str(task.kind, refresh=False)
            yield from results


def read_results(path: Path | None) -> dict[Task, list[Result]]:
    """What earlier runs have recorded, by task."""
    recorded = {}
    if path and path.exists():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            task = Task(entry["area"], entry["kind"], tuple(entry["numbers"]))
            recorded[task] = [Result(task.area, task.kind, *result) for result in entry["results"]]
    return recorded


def record_results(path: Path, task: Task, results: list[Result]) -> None:
    """Adds the results of a task to those that are recorded."""
    triples = [(result.number, result.outcome, result.detail) for result in results]
    with path.open("a") as file:
        file.write(json.dumps(vars(task) | {"results": triples}) + "\n")


def run_tasks(tasks: list[Task], options) -> Iterator[tuple[Task, list[Result]]]:
    """Each task with its results, as they come."""
    settings = (options.folder, options.seed, options.positions)
    if options.jobs == 1:
        with open_session(options.folder) as session:
            for task in tasks:
                yield task, run_task(session, task, options.seed, options.positions)
        return
    context = multiprocessing.get_context("spawn")
    waiting, done = context.Queue(), context.Queue()
    for task in [*tasks, *[None] * options.jobs]:
        waiting.put(task)
    workers = [context.Process(target=work, args=(waiting, done, *settings)) for _ in range(options.jobs)]
    for worker in workers:
        worker.start()
    for _ in tasks:
        answer = next_of(done, workers)
        if isinstance(answer, str):
            raise RuntimeError(f"the trials themselves failed: {answer}")
        yield answer
    for worker in workers:
        worker.join()


def next_of(done, workers: list) -> tuple[Task, list[Result]] | str:
    """The next task that is done, with its results; an error where a worker has died."""
    while True:
        try:
            return done.get(timeout=5)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                return f"a worker ended with exit code {dead[0]}"


def work(waiting, done, folder: Path, seed: int, positions: int) -> None:
    """Takes tasks until there are no more. Each process has a warmed process of its own; they share BASE."""
    with open_session(folder) as session:
        while (task := waiting.get()) is not None:
            try:
                done.put((task, run_task(session, task, seed, positions)))
            except Exception as error:
                done.put(f"{task.kind}: {type(error).__name__}: {error}")
                raise


def area_of(kind: str) -> str:
    """The area that a kind of trial belongs to."""
    if kind in fuzz.ALL_KINDS:
        return "fuzz"
    name = kind.partition(": ")[0]
    return name if name in AREAS else "fuzz"


def plan(options) -> Iterator[Task]:
    """All trials, in pieces that keep several processes busy."""
    areas = options.areas or AREAS
    for kind in fuzz.ALL_KINDS:
        if "fuzz" in areas or kind in areas:
            size = fuzz_inputs.IMAGES_AT_ONCE if kind == "images" else 10
            for start in range(0, options.count, size):
                yield Task("fuzz", kind, tuple(range(start, min(start + size, options.count))))
            yield Task("fuzz", f"{kind} from cold", tuple(range(min(COLD, options.count))))
    if "hostile" in areas:
        for number, name in enumerate(hostile.CASES):
            yield Task("hostile", f"hostile: {name}", (number,))
    for name in WRITERS:
        amount = -(-options.kills // len(WRITERS))
        if "kills" in areas:
            yield Task("kills", f"kills: {name}", tuple(range(amount)))
        if "faults" in areas:
            amount = 1 if name in ONCE else options.positions
            for fault in faults.FAULTS:
                yield Task("faults", f"faults: {name}: {fault.name}", tuple(range(amount)))
            if name != "demo":
                yield Task("faults", f"faults: {name}: small disk", tuple(range(len(SIZES))))
                yield Task("faults", f"faults: {name}: bounded files", tuple(range(len(SIZES))))
                yield Task("faults", f"faults: {name}: read-only folder", (0,))
        if "pairs" in areas and name != "demo":
            yield Task("pairs", f"pairs: {name} twice", tuple(range(5)))
            if name in pairs.READERS:
                yield Task("pairs", f"pairs: {name} and readers", tuple(range(5)))
    if "again" in areas:
        for name in again.CHECKS:
            yield Task("again", f"again: {name}", (0,))
    if "long" in areas:
        for name in endurance.CHECKS:
            yield Task("long", f"long: {name}", (0,))


def run_task(session: Session, task: Task, seed: int, positions: int) -> list[Result]:
    """Runs the trials of a task."""
    verdicts = list(verdicts_of(session, task, seed, positions))
    return [
        Result(task.area, task.kind, number, verdict.outcome, verdict.detail)
        for number, verdict in zip(task.numbers, verdicts, strict=False)
    ]


def verdicts_of(session: Session, task: Task, seed: int, positions: int) -> Iterator[Verdict]:
    """The verdict on each trial of a task; fewer than asked for where there is nothing to try."""
    if task.area == "fuzz":
        session.cold = task.kind.endswith(" from cold")
        try:
            yield from fuzz.run_trials(session, task.kind.removesuffix(" from cold"), seed, list(task.numbers))
        finally:
            session.cold = False
        return
    _, name, *rest = task.kind.split(": ")
    base, warm = session.workspace, session.warm
    if task.area == "hostile":
        yield hostile.try_case(session, name)
    elif task.area == "again":
        yield again.CHECKS[name](session)
    elif task.area == "long":
        yield endurance.CHECKS[name](session)
    elif task.area == "pairs" and name.endswith(" and readers"):
        name = name.removesuffix(" and readers")
        for number in task.numbers:
            yield pairs.try_reader(warm, base, name, session.clean(name), seed, number)
    else:
        name = name.removesuffix(" twice")
        writer, clean, archives = WRITERS[name], session.clean(name), session.archives(name)
        for number in task.numbers:
            if task.area == "pairs":
                yield pairs.try_twice_at_once(warm, base, writer, clean, seed, number, archives)
            elif task.area == "kills":
                yield kills.try_kill(warm, base, writer, clean, seed, number, archives)
            else:
                yield from try_fault(session, name, rest[0], seed, number, positions)


def try_fault(session: Session, name: str, what: str, seed: int, number: int, positions: int) -> Iterator[Verdict]:
    """The verdict on one failing call, small disk or bounded file of a writer; none where it makes no such call."""
    writer, clean, archives = WRITERS[name], session.clean(name), session.archives(name)
    arguments = (session.warm, session.workspace, writer, clean)
    if what == "small disk":
        yield faults.try_small_disk(*arguments, SIZES[number], archives)
    elif what == "bounded files":
        yield faults.try_file_size(*arguments, SIZES[number], archives)
    elif what == "read-only folder":
        yield faults.try_read_only(*arguments, archives)
    elif not session.no_faults:
        fault = next(fault for fault in faults.FAULTS if fault.name == what)
        places = faults.positions(clean.calls[fault.call], positions, seed)
        if places:
            verdict = faults.try_fault(*arguments, fault, places[number], archives)
            yield Verdict(verdict.outcome, f"call {places[number]} of {clean.calls[fault.call]}: {verdict.detail}")


def report(results: list[Result], options) -> str:
    """A Markdown table for each area."""
    lines = []
    shown = OUTCOMES
    for area in AREAS:
        chosen = [result for result in results if result.area == area]
        if not chosen:
            continue
        rows: dict[str, Counter] = {}
        for result in chosen:
            kind = result.kind.rpartition(": ")[0] if area == "faults" else result.kind
            rows.setdefault(kind.removeprefix(f"{area}: "), Counter())[result.outcome] += 1
        lines += [
            f"### {area}",
            "",
            f"`python benchmarks/bench_reliability.py {area} --folder DIR --seed {options.seed}`",
        ]
        lines += ["", f"| what | trials | {' | '.join(shown)} |", "| --- |" + " ---: |" * (len(shown) + 1)]
        for kind, counter in rows.items():
            cells = " | ".join(str(counter[outcome]) for outcome in shown)
            lines.append(f"| {kind} | {counter.total()} | {cells} |")
        total = sum(rows.values(), Counter())
        cells = " | ".join(str(total[outcome]) for outcome in shown)
        lines += [f"| all | {total.total()} | {cells} |", ""]
        lines += [f"- {result.kind}: {result.detail}" for result in chosen if area in ("again", "long")]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
