"""Corrupted results: stores, runs, sweeps, indexes, activations, and the JSON in each."""

import random
import shutil
from pathlib import Path

from reliability import contents, mutators, text_mutators
from reliability.contents import difference
from reliability.fuzz_inputs import fuzz_karpathy
from reliability.judging import CPU, QUERY, judge, judge_printed, mutate_file, trial_generator
from reliability.session import Session
from reliability.trials import Command, Verdict
from reliability.workspace import FIT, GRID, TUNE


def fuzz_json(session: Session, seed: int, number: int) -> Verdict:
    """Reads damaged JSON of a run, an index, a sweep, a fine-tuned run, or a dataset."""
    generator = trial_generator("json", seed, number)
    base, scratch = session.workspace, session.scratch()
    way = generator.choice(("run", "run", "index", "index", "tokenizer", "sweep", "trial", "info", "karpathy"))
    if way == "karpathy":
        return fuzz_karpathy(session, scratch, generator)
    if way in ("sweep", "trial"):
        pattern = "sweep.json" if way == "sweep" else "trials/*.json"
        return fuzz_sweep_file(session, scratch, pattern, generator)
    if way == "index":
        shutil.copytree(base.index, scratch / "index")
        path = generator.choice(sorted((scratch / "index/images").glob("[Cm]*")))
        damaged = text_mutators.mutate_json(path.read_text(), generator)
        path.write_bytes(damaged)
        options = ("search", "--run", base.run, "--index", scratch / "index", *QUERY)
        return judge_printed(session, scratch, options, (*options[:4], base.index, *QUERY))
    shutil.copytree(base.run, scratch / "run")
    path = scratch / "run" / ("tokenizer/tokenizer.json" if way == "tokenizer" else "run.json")
    path.write_bytes(text_mutators.mutate_json(path.read_text(), generator))
    if way == "info":
        return judge_printed(session, scratch, ("info", scratch / "run"), ("info", base.run), compared=False)
    return judge_printed(
        session, scratch, ("search", "--run", scratch / "run", *QUERY), ("search", "--run", base.run, *QUERY)
    )


def fuzz_stores(session: Session, seed: int, number: int) -> Verdict:
    """Fits, describes and verifies damaged stores."""
    generator = trial_generator("stores", seed, number)
    base, scratch = session.workspace, session.scratch()
    path = scratch / "s.h5"
    path.write_bytes(mutators.mutate_bytes(base.store.read_bytes(), generator))
    way = generator.choice(("fit", "fit", "fit", "fit", "info", "verify", "evaluate"))
    if way == "info":
        return judge_printed(session, scratch, ("info", path), ("info", base.store), compared=False)
    if way == "verify":
        return judge_printed(session, scratch, ("verify", path), ("verify", base.store))
    if way == "evaluate":
        clean = session.once(Command(("compare", str(base.run), str(base.other_run))))
        options = ("ensemble", base.run, base.other_run, "--out", scratch / "run", "--store", path)
        expected = session.clean("ensemble").values
        limits = {"cpu_seconds": clean.cpu_seconds + 11}
    else:
        options = ("fit", "--store", path, "--run", scratch / "run", *FIT)
        expected = session.clean("fit").values
        limits = {}
    return judge(
        session,
        scratch,
        options,
        lambda: difference(expected, contents.run_values(scratch / "run")),
        ("run",),
        **limits,
    )


def fuzz_runs(session: Session, seed: int, number: int) -> Verdict:
    """Searches, compares and describes damaged runs."""
    generator = trial_generator("runs", seed, number)
    base, scratch = session.workspace, session.scratch()
    shutil.copytree(base.run, scratch / "run")
    files = ("heads.safetensors", "heads.safetensors", "embeddings.h5", "run.json", "tokenizer/tokenizer.json")
    name = generator.choice(files)
    mutate_file(scratch / "run" / name, generator)
    way = generator.choice(("search", "search", "image", "compare"))
    if way == "compare" and name in ("embeddings.h5", "run.json"):
        clean = ("compare", base.run, base.other_run, "--json")
        return judge_printed(session, scratch, ("compare", scratch / "run", base.other_run, "--json"), clean)
    query = ("--query", base.query, "--mode", "image2text", "--json", *CPU) if way == "image" else QUERY
    options = ("search", "--run", scratch / "run", *query)
    return judge_printed(session, scratch, options, ("search", "--run", base.run, *query))


def fuzz_sweeps(session: Session, seed: int, number: int) -> Verdict:
    """Goes on with sweeps whose trials, provenance or tables are damaged, and draws them."""
    generator = trial_generator("sweeps", seed, number)
    scratch = session.scratch()
    pattern = generator.choice(("trials/*.json", "trials/*.npz", "sweep.json", "results.csv", "best.yaml"))
    return fuzz_sweep_file(session, scratch, pattern, generator)


def fuzz_sweep_file(session: Session, scratch: Path, pattern: str, generator: random.Random) -> Verdict:
    """Damages one file of a sweep and runs the sweep again, or draws it."""
    base = session.workspace
    shutil.copytree(base.sweep, scratch / "sweep")
    mutate_file(generator.choice(sorted((scratch / "sweep").glob(pattern))), generator)
    if generator.random() < 0.1:
        options = ("plot", "--sweep", scratch / "sweep", "--out", scratch / "figures")
        return judge(session, scratch, options, lambda: "", ("figures",))
    options = ("sweep", "--store", base.store, "--out", scratch / "sweep", *GRID, *FIT)
    expected = contents.sweep_values(base.sweep)
    skipped = ("onceover.analysis.figures:plot_sweep",)
    return judge(
        session,
        scratch,
        options,
        lambda: difference(expected, contents.sweep_values(scratch / "sweep")),
        ("sweep",),
        skipped=skipped,
    )


def fuzz_indexes(session: Session, seed: int, number: int) -> Verdict:
    """Searches damaged indexes."""
    generator = trial_generator("indexes", seed, number)
    base, scratch = session.workspace, session.scratch()
    shutil.copytree(base.index, scratch / "index")
    mutate_file(generator.choice(sorted((scratch / "index/images").glob("[!.]*"))), generator)
    options = ("search", "--run", base.run, "--index", scratch / "index", *QUERY)
    return judge_printed(session, scratch, options, (*options[:4], base.index, *QUERY))


def fuzz_activations(session: Session, seed: int, number: int) -> Verdict:
    """Fine-tunes with damaged cached activations."""
    generator = trial_generator("activations", seed, number)
    clean = session.clean("finetune")
    base, scratch = session.workspace, session.scratch()
    shutil.copytree(base.activations, scratch / "activations")
    mutate_file(next((scratch / "activations").glob("*.h5")), generator)
    options = ("finetune", "--run", base.run, "--data", base.data / "captions.csv", "--store", base.store)
    options = (*options, "--out", scratch / "tuned", *TUNE)
    return judge(
        session,
        scratch,
        options,
        lambda: difference(clean.values, contents.tuned_values(scratch / "tuned")),
        ("tuned", "activations"),
        cpu_seconds=clean.ended.cpu_seconds + 10,
    )
