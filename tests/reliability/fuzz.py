"""Corrupted inputs of each kind, a command that reads them, and a judgement of what it made of them.

A trial is repeated by its kind, the seed and its number. ``KINDS`` names the functions that run trials.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import yaml

from reliability import contents, mutators
from reliability.contents import Snapshot, difference
from reliability.images import SUFFIXES, mutate_image
from reliability.session import Session
from reliability.trials import Command, Verdict, classify
from reliability.workspace import FIT, GRID, TUNE
from reliability.writers import archives_of

CPU = ("--device", "cpu")
QUERY = ("--query", "a red circle above a blue square", "--json", *CPU)
IMAGES_AT_ONCE = 40
WHOLE_IMAGES = 8


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
            changed = mutators.mutate_json(data.decode(), generator)
        elif path.suffix == ".yaml" and generator.random() < 0.8:
            changed = mutators.mutate_yaml(data.decode(), generator)
        else:
            changed = mutators.mutate_bytes(data, generator)
        if changed != data:
            break
    path.write_bytes(changed)
    return f"{path.name} {hashlib.sha256(changed).hexdigest()[:8]}"


def fuzz_images(session: Session, seed: int, numbers: list[int]) -> list[Verdict]:
    """Encodes many corrupted images at once, among whole ones, and judges each by its row or its line in the ledger."""
    verdict, verdicts = encode_images(session, seed, numbers)
    if not verdict.is_fault or len(numbers) == 1:
        return verdicts or [verdict] * len(numbers)
    single = [encode_images(session, seed, [number]) for number in numbers]
    return [(rows or [alone])[0] for alone, rows in single]


def encode_images(session: Session, seed: int, numbers: list[int]) -> tuple[Verdict, list[Verdict]]:
    """The verdict on the command, and on each image where the command ended well."""
    clean = session.clean("extract")  # of the same whole images first
    scratch = session.scratch()
    folder = scratch / "images"
    folder.mkdir()
    names = {}
    lines = ["image,caption,split"]
    for position in range(WHOLE_IMAGES):
        name = f"{position:04d}.jpg"
        shutil.copy2(session.workspace.data / "images" / name, folder / name)
        lines.append(f"{name},a whole image {position},{('train', 'dev', 'test')[position % 3]}")
    for number in numbers:
        generator = trial_generator("images", seed, number)
        data, _ = mutate_image(generator)
        names[number] = f"n{number}{generator.choice(SUFFIXES)}"
        (folder / names[number]).write_bytes(data)
        lines.append(f"{names[number]},image number {number},train")
    (scratch / "captions.csv").write_text("\n".join(lines) + "\n")
    options = ("extract", "--data", scratch, "--store", scratch / "s.h5", *session.workspace.encoders())
    verdicts: list[Verdict] = []

    def differs() -> str:
        with h5py.File(scratch / "s.h5", "r") as file:
            ids = list(file["image/id"].asstr()[:])
            features = file["image/features"][:]
            hashes = dict(zip(ids, file["image/sha256"].asstr()[:], strict=True))
            failures = set(file["failures/id"].asstr()[:])
        rows = dict(zip(ids, features, strict=True))
        lost = [name for name in lines[1 : WHOLE_IMAGES + 1] if name.partition(",")[0] not in rows]
        for name in names.values():
            sha = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if name in rows and hashes[name] == sha and np.isfinite(rows[name]).all() and name not in failures:
                verdicts.append(Verdict("right"))
            elif name in failures and name not in rows:
                verdicts.append(Verdict("ledger"))
            else:
                verdicts.append(Verdict("silent difference", f"{name} is neither a row nor in the ledger"))
        return f"whole images are missing: {lost}" if lost else whole_rows_differ(session, rows)

    limits = {"cpu_seconds": clean.ended.cpu_seconds + 10 + 2 * len(numbers)}
    verdict = judge(session, scratch, options, differs, ("s.h5",), **limits)
    return verdict, [] if verdict.is_fault else verdicts


def whole_rows_differ(session: Session, rows: dict) -> str:
    """Whether whole images have other features than without corrupted ones beside them."""
    with h5py.File(session.workspace.store, "r") as file:
        features = dict(zip(file["image/id"].asstr()[:], file["image/features"][:], strict=True))
    for position in range(WHOLE_IMAGES):
        name = f"{position:04d}.jpg"
        if not np.allclose(rows[name], features[f"images/{name}"], rtol=1e-3, atol=1e-4):
            return f"{name} has other features"
    return ""


def fuzz_captions(session: Session, seed: int, number: int) -> Verdict:
    """Reads a damaged table or text of captions with ``import``, ``extract`` or ``index``."""
    generator = trial_generator("captions", seed, number)
    scratch = session.scratch()
    base = session.workspace
    way = number % 8
    if way == 0:
        text = "".join(f"a red circle number {line}\n" for line in range(8))
        (scratch / "captions.txt").write_bytes(mutators.mutate_table(text, generator))
        options = ("index", "--run", base.run, "--captions", scratch / "captions.txt", "--index", scratch / "i", *CPU)
        return judge(session, scratch, options, lambda: "", ("i",))
    if way == 1:
        for name in ("0000.jpg", "0001.jpg", "0014.jpg", "0019.jpg"):
            (scratch / "Images").mkdir(exist_ok=True)
            shutil.copy2(base.data / "images" / name, scratch / "Images" / name)
        lines = ["image,caption", *(f"{name:04d}.jpg,caption of {name}" for name in (0, 1, 14, 19))]
        (scratch / "captions.txt").write_bytes(mutators.mutate_table("\n".join(lines) + "\n", generator))
        options = ("extract", "--data", scratch, "--store", scratch / "s.h5", *base.encoders())
        return judge(session, scratch, options, lambda: store_is_odd(scratch / "s.h5"), ("s.h5",))
    table = (base.imported / "captions.csv").read_text()
    (scratch / "captions.csv").write_bytes(mutators.mutate_table(table, generator))
    options = ("import", "--image-features", base.imported / "images.npy", "--captions", scratch / "captions.csv")
    options = (*options, "--text-features", base.imported / "texts.npy", "--store", scratch / "s.h5")
    return judge(session, scratch, options, lambda: store_is_odd(scratch / "s.h5"), ("s.h5",))


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
        damaged = mutators.mutate_json(path.read_text(), generator)
        path.write_bytes(damaged)
        options = ("search", "--run", base.run, "--index", scratch / "index", *QUERY)
        return judge_printed(session, scratch, options, (*options[:4], base.index, *QUERY))
    shutil.copytree(base.run, scratch / "run")
    path = scratch / "run" / ("tokenizer/tokenizer.json" if way == "tokenizer" else "run.json")
    path.write_bytes(mutators.mutate_json(path.read_text(), generator))
    if way == "info":
        return judge_printed(session, scratch, ("info", scratch / "run"), ("info", base.run), compared=False)
    return judge_printed(
        session, scratch, ("search", "--run", scratch / "run", *QUERY), ("search", "--run", base.run, *QUERY)
    )


def fuzz_karpathy(session: Session, scratch: Path, generator: random.Random) -> Verdict:
    """Extracts a dataset whose split file in JSON is damaged."""
    entries = []
    for position in (0, 1, 14, 19):
        name = f"{position:04d}.jpg"
        shutil.copy2(session.workspace.data / "images" / name, scratch / name)
        sentences = [{"raw": f"caption of {name}", "sentid": position, "imgid": position}]
        split = "train" if position < 14 else "test"
        entries.append({"filename": name, "split": split, "sentences": sentences, "imgid": position})
    path = scratch / "dataset_flickr8k.json"
    mutated = mutators.mutate_json(json.dumps({"images": entries, "dataset": "flickr8k"}), generator)
    path.write_bytes(mutated)
    options = ("extract", "--data", scratch, "--store", scratch / "s.h5", *session.workspace.encoders())
    return judge(session, scratch, options, lambda: store_is_odd(scratch / "s.h5"), ("s.h5",))


def fuzz_yaml(session: Session, seed: int, number: int) -> Verdict:
    """Fits with damaged settings, or reads a run whose settings are damaged."""
    generator = trial_generator("yaml", seed, number)
    base, scratch = session.workspace, session.scratch()
    if number % 3 == 2:
        shutil.copytree(base.run, scratch / "run")
        path = scratch / "run/config.yaml"
        path.write_bytes(mutators.mutate_yaml(path.read_text(), generator))
        return judge_printed(session, scratch, ("info", scratch / "run"), ("info", base.run), compared=False)
    text = (base.run / "config.yaml").read_text().replace("num_epochs: 2", "num_epochs: 1")
    path = scratch / "config.yaml"
    path.write_bytes(mutators.mutate_yaml(text, generator))
    options = ("fit", "--store", base.store, "--run", scratch / "run", "--config", path, *CPU)
    verdict = judge(session, scratch, options, lambda: run_is_odd(scratch / "run"), ("run",))
    if verdict.outcome == "hang" and asks_for_more(path, text):
        return Verdict("right", "a long fit was asked for")
    return verdict


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
    skipped = ("analysis.sweeps:plot_sweep",)
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


def fuzz_npy(session: Session, seed: int, number: int) -> Verdict:
    """Imports damaged and odd .npy files."""
    generator = trial_generator("npy", seed, number)
    base, scratch = session.workspace, session.scratch()
    for name in ("images.npy", "texts.npy"):
        shutil.copy2(base.imported / name, scratch / name)
    path = scratch / generator.choice(("images.npy", "texts.npy"))
    if generator.random() < 0.15:
        np.save(path, mutators.odd_array(generator))
    else:
        path.write_bytes(mutators.mutate_array(path.read_bytes(), generator))
    options = ("import", "--image-features", scratch / "images.npy", "--text-features", scratch / "texts.npy")
    options = (*options, "--captions", base.imported / "captions.csv", "--store", scratch / "s.h5")

    def differs() -> str:
        with h5py.File(scratch / "s.h5", "r") as file:
            kind = "image" if path.name == "images.npy" else "text"
            stored = file[f"{kind}/features"][:]
        given = np.load(path, allow_pickle=False).reshape(stored.shape)
        return "" if np.array_equal(stored, given.astype(stored.dtype)) else "other features than in the file"

    return judge(session, scratch, options, differs, ("s.h5",))


def fuzz_zip(session: Session, seed: int, number: int) -> Verdict:
    """Downloads damaged archives, whose checksum is told to be right."""
    generator = trial_generator("zip", seed, number)
    base, scratch = session.workspace, session.scratch()
    damaged = scratch / "Flickr8k_Dataset.zip"
    damaged.write_bytes(mutators.mutate_bytes(base.archive.read_bytes(), generator))
    address = f"{session.address}/{damaged.relative_to(base.folder)}"
    sha = hashlib.md5(damaged.read_bytes()).hexdigest()
    archives = ((address, sha, "Flicker8k_Dataset"), archives_of(base, session.address)[1])
    clean = set(session.clean("download").values.values())

    def differs() -> str:
        odd = [name for name, value in contents.folder_values(scratch / "data").items() if value not in clean]
        return f"damaged files were unpacked: {odd[:3]}" if odd else ""

    return judge(session, scratch, ("download", "flickr8k", "--to", scratch / "data"), differs, archives=archives)


KINDS: dict[str, Callable[[Session, int, int], Verdict]] = {
    "captions": fuzz_captions,
    "json": fuzz_json,
    "yaml": fuzz_yaml,
    "stores": fuzz_stores,
    "runs": fuzz_runs,
    "sweeps": fuzz_sweeps,
    "indexes": fuzz_indexes,
    "activations": fuzz_activations,
    "npy": fuzz_npy,
    "zip": fuzz_zip,
}
ALL_KINDS = ("images", *KINDS)


def run_trials(session: Session, kind: str, seed: int, numbers: list[int]) -> list[Verdict]:
    """Runs the trials with these numbers; images are encoded many at once."""
    if kind == "images":
        return fuzz_images(session, seed, numbers)
    return [KINDS[kind](session, seed, number) for number in numbers]
