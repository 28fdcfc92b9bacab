"""Runs one command on a damaged file and judges what came of it."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import yaml

from reliability import contents, mutators, text_mutators
from reliability.contents import Snapshot
from reliability.session import Session
from reliability.trials import Command, Verdict, classify

CPU = ("--device", "cpu")
QUERY = ("--query", "a red circle above a blue square", "--json", *CPU)


def trial_generator(kind: str, seed: int, number: int) -> random.Random:
    """The random numbers of one trial."""
    return random.Random(f"{seed} {kind} {number}")


def judge(
    session: Session,
    scratch: Path,
    arguments: tuple,
    differs: Callable[[], str],
    outputs: tuple[str, ...] = (),
    **conditions,
) -> Verdict:
    """Runs a command line in the trial's folder and judges how it ended."""
    before = Snapshot(scratch)
    command = Command(tuple(str(part) for part in arguments), folder=str(scratch), **conditions)
    ended = session.run(command)
    paths = tuple(scratch / output for output in outputs)
    return classify(ended, lambda: differs_or_unreadable(differs), before, paths)


def differs_or_unreadable(differs: Callable[[], str]) -> str:
    """What differs, where a result that cannot be read at all differs too."""
    try:
        return differs()
    except (OSError, ValueError, KeyError) as error:
        return f"the result cannot be read: {type(error).__name__}: {error}"


def judge_printed(session: Session, scratch: Path, arguments: tuple, clean: tuple, compared: bool = True) -> Verdict:
    """Judges a command by what it prints, which has to be what the command on clean files prints."""
    expected = session.once(Command(tuple(str(part) for part in clean)))
    before = Snapshot(scratch)
    command = Command(tuple(str(part) for part in arguments), folder=str(scratch)).allowing(expected)
    ended = session.run(command)

    def differs() -> str:
        base, trial = str(session.workspace.base), str(scratch)
        same = ended.stdout.replace(trial, base) == expected.stdout.replace(trial, base)
        return "" if same or not compared else f"prints {ended.stdout[:200]!r}"

    return classify(ended, differs, before)


def mutate_file(path: Path, generator: random.Random) -> str:
    """Damages a file in the way of its format, or any; gives its name and digest for the record."""
    data = path.read_bytes()
    changed = data
    for _ in range(5):
        if path.suffix == ".json" and generator.random() < 0.7:
            changed = text_mutators.mutate_json(data.decode(), generator)
        elif path.suffix == ".yaml" and generator.random() < 0.8:
            changed = text_mutators.mutate_yaml(data.decode(), generator)
        else:
            changed = mutators.mutate_bytes(data, generator)
        if changed != data:
            break
    path.write_bytes(changed)
    return f"{path.name} {hashlib.sha256(changed).hexdigest()[:8]}"


def store_is_odd(path: Path) -> str:
    """What no store may be: columns of different lengths, captions of no image, numbers that are not finite."""
    with h5py.File(path, "r") as file:
        images, captions = (len(file[f"{kind}/features"]) for kind in ("image", "text"))
        lengths = {len(file[f"image/{name}"]) for name in ("id", "path", "split", "sha256")}
        if lengths != {images} or len(file["text/caption"]) != captions:
            return "columns of different lengths"
        index = file["text/image_index"][:]
        if captions and (index.min() < 0 or index.max() >= images):
            return "a caption of no image"
        if len(set(file["image/id"].asstr()[:])) != images:
            return "an image twice"
        finite = all(np.isfinite(file[f"{kind}/features"][:]).all() for kind in ("image", "text"))
    return "" if finite else "features that are not finite"


def run_is_odd(folder: Path) -> str:
    """What no run may be: without heads, or with embeddings that are not finite."""
    contents.run_values(folder)
    with h5py.File(folder / "embeddings.h5", "r") as file:
        finite = all(np.isfinite(file[f"{kind}/embedding"][:]).all() for kind in ("image", "text"))
    return "" if finite else "embeddings that are not finite"


def asks_for_more(path: Path, clean: str) -> bool:
    """Whether damaged settings are well-formed and ask for more epochs, members or dimensions."""
    try:
        damaged = yaml.safe_load(path.read_bytes())
        old = yaml.safe_load(clean)
        pairs = [(damaged[group][key], old[group][key]) for group in ("model", "training") for key in old[group]]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return False
    return any(isinstance(new, int) and new > before for new, before in pairs if isinstance(before, int))
