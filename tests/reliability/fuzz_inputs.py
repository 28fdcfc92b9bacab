"""Corrupted inputs of a user's own: images, captions, settings, arrays, archives."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import h5py
import numpy as np

from reliability import contents, mutators, text_mutators
from reliability.images import SUFFIXES, mutate_image
from reliability.judging import (
    CPU,
    asks_for_more,
    judge,
    judge_printed,
    run_is_odd,
    store_is_odd,
    trial_generator,
)
from reliability.session import Session
from reliability.trials import Verdict
from reliability.writers import archives_of

IMAGES_AT_ONCE = 40
WHOLE_IMAGES = 8


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
        (scratch / "captions.txt").write_bytes(text_mutators.mutate_table(text, generator))
        options = ("index", "--run", base.run, "--captions", scratch / "captions.txt", "--index", scratch / "i", *CPU)
        return judge(session, scratch, options, lambda: "", ("i",))
    if way == 1:
        for name in ("0000.jpg", "0001.jpg", "0014.jpg", "0019.jpg"):
            (scratch / "Images").mkdir(exist_ok=True)
            shutil.copy2(base.data / "images" / name, scratch / "Images" / name)
        lines = ["image,caption", *(f"{name:04d}.jpg,caption of {name}" for name in (0, 1, 14, 19))]
        (scratch / "captions.txt").write_bytes(text_mutators.mutate_table("\n".join(lines) + "\n", generator))
        options = ("extract", "--data", scratch, "--store", scratch / "s.h5", *base.encoders())
        return judge(session, scratch, options, lambda: store_is_odd(scratch / "s.h5"), ("s.h5",))
    table = (base.imported / "captions.csv").read_text()
    (scratch / "captions.csv").write_bytes(text_mutators.mutate_table(table, generator))
    options = ("import", "--image-features", base.imported / "images.npy", "--captions", scratch / "captions.csv")
    options = (*options, "--text-features", base.imported / "texts.npy", "--store", scratch / "s.h5")
    return judge(session, scratch, options, lambda: store_is_odd(scratch / "s.h5"), ("s.h5",))


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
    mutated = text_mutators.mutate_json(json.dumps({"images": entries, "dataset": "flickr8k"}), generator)
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
        path.write_bytes(text_mutators.mutate_yaml(path.read_text(), generator))
        return judge_printed(session, scratch, ("info", scratch / "run"), ("info", base.run), compared=False)
    text = (base.run / "config.yaml").read_text().replace("num_epochs: 2", "num_epochs: 1")
    path = scratch / "config.yaml"
    path.write_bytes(text_mutators.mutate_yaml(text, generator))
    options = ("fit", "--store", base.store, "--run", scratch / "run", "--config", path, *CPU)
    verdict = judge(session, scratch, options, lambda: run_is_odd(scratch / "run"), ("run",))
    if verdict.outcome == "hang" and asks_for_more(path, text):
        return Verdict("right", "a long fit was asked for")
    return verdict


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
