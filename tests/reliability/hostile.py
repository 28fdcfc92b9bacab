"""Malicious files: each would run code, reach outside itself, or wait for ever. None may, whatever the command says."""

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from reliability.contents import Snapshot, digests
from reliability.images import png_of_size
from reliability.session import Session
from reliability.trials import Command, Verdict, ending
from reliability.workspace import FIT, GRID, IMAGE_ENCODER

SECRET = b"the secret that no result may hold"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) = showpage\n%%EOF\n"
CPU = ("--device", "cpu")
QUERY = ("--query", "a red circle", "--json", *CPU)
WAIT_SECONDS = 15.0
Commands = list[tuple]


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Trap:
    """A folder of a trial with a secret outside it, and a mark that only code of the malicious file would leave."""

    def __init__(self, session: Session):
        self.base = session.workspace
        self.session = session
        self.outside = session.scratch()
        self.folder = self.outside / "trial"
        self.folder.mkdir()
        self.mark = self.outside / "mark"
        self.secret = self.outside / "secret.txt"
        self.secret.write_bytes(SECRET)
        self.programs = self.outside / "programs"
        self.programs.mkdir()
        for name in ("gs", "gswin32c", "gswin64c", "djpeg", "latex", "pdflatex", "xelatex"):
            program = self.programs / name
            program.write_text(f"#!/bin/sh\ntouch {self.mark}\n")
            program.chmod(0o755)
        self.yes = self.outside / "yes"
        self.yes.write_text("y\n" * 100)

    def pickle(self) -> bytes:
        """A pickle that leaves the mark."""
        return pickle.dumps({"model": Evil(self.mark)})

    def code(self) -> str:
        """Python that leaves the mark."""
        return f"from pathlib import Path\nPath({str(self.mark)!r}).touch()\nclass Evil: pass\n"

    def sign(self, path: Path) -> None:
        """Makes the checksums of a changed store right again, as whoever made it could."""
        self.session.warm.run(Command((str(path),), function="reliability.hostile:sign_store"))

    def copied(self, *names: str) -> None:
        """Copies parts of BASE into the trial's folder."""
        for name in names:
            source, target = self.base.base / name, self.folder / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)


def sign_store(name: str) -> None:
    """Writes the checksums of a store for what it holds now."""
    from extract import store

    with h5py.File(name, "r+") as file:
        for dataset in store._datasets(file):
            file[dataset].attrs["sha256"] = store.checksum(file[dataset])
        file.attrs["attributes_sha256"] = store._attributes_checksum(file)


def fit_command(trap: Trap, store: Path | str) -> tuple:
    """A fit on a store."""
    return ("fit", "--store", store, "--run", trap.folder / "run", *FIT)


def extract_command(trap: Trap, data: Path, *options) -> tuple:
    """An extraction with tiny encoders."""
    return ("extract", "--data", data, "--store", trap.folder / "new.h5", *trap.base.encoders(), *options)


def pickled_resume(trap: Trap) -> Commands:
    """An unfinished run whose state is a pickle with code."""
    trap.copied("run")
    (trap.folder / "run/run.json").unlink()
    (trap.folder / "run/resume.pt").write_bytes(trap.pickle())
    return [fit_command(trap, trap.base.store)]


def pickled_trial(trap: Trap) -> Commands:
    """A sweep whose waiting trials are pickles with code."""
    options = ("sweep", "--store", trap.base.store, "--out", trap.folder / "sweep", *GRID, *FIT, "--halving")
    command = Command(tuple(str(part) for part in options), skipped=("analysis.sweeps:plot_sweep",))
    trap.session.warm.run(command)
    for path in sorted((trap.folder / "sweep/trials").glob("*.json")):
        path.with_suffix(".pt").write_bytes(trap.pickle())
        path.unlink()
    return [options]


def pickled_weights(trap: Trap) -> Commands:
    """Weights of an image encoder that are a pickle with code."""
    (trap.folder / "w.pth").write_bytes(trap.pickle())
    spec = f"{IMAGE_ENCODER.partition('@')[0]}@{trap.folder / 'w.pth'}"
    return [extract_command(trap, trap.base.data, "--image-encoder", spec)]


def pickled_array(trap: Trap) -> Commands:
    """Features that are pickled objects."""
    np.save(trap.folder / "i.npy", np.array([Evil(trap.mark)] * 24, dtype=object), allow_pickle=True)
    features = ("--image-features", trap.folder / "i.npy", "--text-features", trap.base.imported / "texts.npy")
    captions = ("--captions", trap.base.imported / "captions.csv")
    return [("import", *features, *captions, "--store", trap.folder / "new.h5")]


def write_evil_tokenizer(trap: Trap, folder: Path) -> None:
    """Adds code, and a configuration that asks for it, to a tokenizer's folder."""
    (folder / "evil.py").write_text(trap.code())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Evil"
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tokenizer_of_run(trap: Trap) -> Commands:
    """A run whose tokenizer asks for code of its own."""
    trap.copied("run")
    write_evil_tokenizer(trap, trap.folder / "run/tokenizer")
    return [("search", "--run", trap.folder / "run", *QUERY)]


def tokenizer_of_store(trap: Trap) -> Commands:
    """A store whose tokenizer asks for code of its own."""
    trap.copied("s.h5", "run")
    write_evil_tokenizer(trap, trap.folder / "run/tokenizer")
    with h5py.File(trap.folder / "s.h5", "r+") as file:
        for path in (trap.folder / "run/tokenizer").iterdir():
            if path.name in file["tokenizer"]:
                del file["tokenizer"][path.name]
            file["tokenizer"][path.name] = np.frombuffer(path.read_bytes(), np.uint8)
    shutil.rmtree(trap.folder / "run")
    trap.sign(trap.folder / "s.h5")
    search = ("search", "--run", trap.folder / "run", *QUERY)
    return [fit_command(trap, trap.folder / "s.h5"), search]


def encoder_folder(trap: Trap) -> Commands:
    """A text encoder's folder that asks for code of its own."""
    trap.copied("bert")
    write_evil_tokenizer(trap, trap.folder / "bert")
    config = json.loads((trap.folder / "bert/config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    config["model_type"] = "evil"
    (trap.folder / "bert/config.json").write_text(json.dumps(config))
    return [extract_command(trap, trap.base.data, "--text-encoder", f"hf:{trap.folder / 'bert'}", "--limit", 4)]


def postscript(trap: Trap) -> Commands:
    """PostScript that is called .jpg, where a Ghostscript is on the path."""
    (trap.folder / "images").mkdir()
    shutil.copy2(trap.base.query, trap.folder / "images/good.jpg")
    for name in ("bad.jpg", "bad.tif", "bad.png"):
        (trap.folder / "images" / name).write_bytes(POSTSCRIPT)
    index = ("index", "--run", trap.base.run, "--images", trap.folder / "images", "--index", trap.folder / "i", *CPU)
    query = ("--query", trap.folder / "images/bad.jpg", "--mode", "image2text", *CPU)
    return [index, ("search", "--run", trap.base.run, *query)]


def archive_with(trap: Trap, entries: list[zipfile.ZipInfo]) -> Commands:
    """A download of an archive that holds strange entries beside good ones."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("Flicker8k_Dataset/0.jpg", trap.base.query.read_bytes())
        for entry in entries:
            archive.writestr(entry, b"strange")
    (trap.folder / "a.zip").write_bytes(buffer.getvalue())
    return [("download", "flickr8k", "--to", trap.folder / "data")]


def zip_slips(trap: Trap) -> Commands:
    """An archive whose names lead outside."""
    names = ("../mark", "a/../../../mark", str(trap.mark), "..\\mark", "C:\\mark", "a/./../../mark")
    return archive_with(trap, [zipfile.ZipInfo(name) for name in names])


def zip_names(trap: Trap) -> Commands:
    """An archive with names that are no names."""
    return archive_with(trap, [zipfile.ZipInfo(name) for name in ("", ".", "./", "a" * 300)])


def zip_link(trap: Trap) -> Commands:
    """An archive with a link that leads outside."""
    link = zipfile.ZipInfo("Flicker8k_Dataset/link")
    link.external_attr = 0o120777 << 16
    return archive_with(trap, [link])


def zip_bomb(trap: Trap) -> Commands:
    """An archive that claims to hold more than any disk."""
    commands = archive_with(trap, [zipfile.ZipInfo(f"Flicker8k_Dataset/{number}") for number in range(4)])
    data = bytearray((trap.folder / "a.zip").read_bytes())
    for kind, field in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        start = data.find(kind)
        while start >= 0:
            data[start + field : start + field + 4] = b"\xfe\xff\xff\xff"
            start = data.find(kind, start + 1)
    (trap.folder / "a.zip").write_bytes(bytes(data))
    return commands


def replaced_dataset(trap: Trap, name: str, replace: Callable[[h5py.File, str], None], signed: bool = True) -> Commands:
    """A store one of whose datasets is replaced; verified, fitted and described."""
    trap.copied("s.h5")
    with h5py.File(trap.folder / "s.h5", "r+") as file:
        if name in file:
            del file[name]
        replace(file, name)
    if signed:
        trap.sign(trap.folder / "s.h5")
    store = trap.folder / "s.h5"
    return [("verify", store), fit_command(trap, store), ("info", store)]


def external_storage(trap: Trap) -> Commands:
    """A tokenizer's file whose bytes lie in another file."""
    size = len(SECRET)

    def replace(file: h5py.File, name: str) -> None:
        file.create_dataset(name, (size,), np.uint8, external=[(str(trap.secret), 0, size)])

    return replaced_dataset(trap, "tokenizer/vocab.txt", replace)


def external_link(trap: Trap) -> Commands:
    """A tokenizer's file that is a link into another HDF5 file."""
    with h5py.File(trap.outside / "other.h5", "w") as other:
        other["secret"] = np.frombuffer(SECRET, np.uint8)

    def replace(file: h5py.File, name: str) -> None:
        file[name] = h5py.ExternalLink(str(trap.outside / "other.h5"), "secret")

    return replaced_dataset(trap, "tokenizer/vocab.txt", replace)


def virtual_dataset(trap: Trap) -> Commands:
    """A tokenizer's file that is a view of another HDF5 file."""
    with h5py.File(trap.outside / "other.h5", "w") as other:
        other["secret"] = np.frombuffer(SECRET, np.uint8)

    def replace(file: h5py.File, name: str) -> None:
        layout = h5py.VirtualLayout((len(SECRET),), np.uint8)
        layout[:] = h5py.VirtualSource(str(trap.outside / "other.h5"), "secret", (len(SECRET),))
        file.create_virtual_dataset(name, layout)

    return replaced_dataset(trap, "tokenizer/vocab.txt", replace)


def huge_dataset(trap: Trap) -> Commands:
    """Features that claim a size that no memory has."""

    def replace(file: h5py.File, name: str) -> None:
        file.create_dataset(name, (2**40, 8, 1024), np.float32, chunks=(1, 8, 1024))

    return replaced_dataset(trap, "image/features", replace, signed=False)


def compressed_bomb(trap: Trap) -> Commands:
    """A tokenizer's file of a few kilobytes that unpacks to gigabytes."""

    def replace(file: h5py.File, name: str) -> None:
        file.create_dataset(name, (2**34,), np.uint8, chunks=(2**20,), compression="gzip")

    return replaced_dataset(trap, "tokenizer/vocab.txt", replace, signed=False)


def linked_embeddings(trap: Trap) -> Commands:
    """A run whose embeddings are a link into another file."""
    trap.copied("run")
    shutil.copy2(trap.base.run / "embeddings.h5", trap.outside / "other.h5")
    with h5py.File(trap.folder / "run/embeddings.h5", "r+") as file:
        del file["image/embedding"]
        file["image/embedding"] = h5py.ExternalLink(str(trap.outside / "other.h5"), "image/embedding")
    return [("search", "--run", trap.folder / "run", *QUERY)]


def fifo_as_store(trap: Trap) -> Commands:
    """A store that is a FIFO."""
    os.mkfifo(trap.folder / "s.h5")
    store = trap.folder / "s.h5"
    return [("info", store), ("verify", store), fit_command(trap, store), ("evaluate", "--store", store)]


def fifo_as_image(trap: Trap) -> Commands:
    """A folder with an image that is a FIFO, and one that is a link to a device without end."""
    (trap.folder / "images").mkdir()
    shutil.copy2(trap.base.query, trap.folder / "images/good.jpg")
    os.mkfifo(trap.folder / "images/fifo.jpg")
    (trap.folder / "images/zero.jpg").symlink_to("/dev/zero")
    index = ("index", "--run", trap.base.run, "--images", trap.folder / "images", "--index", trap.folder / "i", *CPU)
    query = ("--query", trap.folder / "images/fifo.jpg", "--mode", "image2text", *CPU)
    lines = ("good.jpg,one,train", "fifo.jpg,two,train", "zero.jpg,three,dev", "good.jpg,four,train")
    (trap.folder / "images/captions.csv").write_text("\n".join(("image,caption,split", *lines)) + "\n")
    return [index, ("search", "--run", trap.base.run, *query), extract_command(trap, trap.folder / "images")]


def fifo_as_text(trap: Trap) -> Commands:
    """Captions and settings that are FIFOs."""
    os.mkfifo(trap.folder / "f.csv")
    os.mkfifo(trap.folder / "f.yaml")
    index = ("index", "--run", trap.base.run, "--captions", trap.folder / "f.csv", "--index", trap.folder / "i", *CPU)
    fit = (*fit_command(trap, trap.base.store), "--config", trap.folder / "f.yaml")
    return [index, extract_command(trap, trap.folder / "f.csv"), fit]


def python_in_settings(trap: Trap) -> Commands:
    """Settings that ask for a call."""
    evil = f"model:\n  temperature: !!python/object/apply:os.system ['touch {trap.mark}']\n"
    (trap.folder / "c.yaml").write_text(evil)
    trap.copied("run")
    (trap.folder / "run/config.yaml").write_text(evil)
    fit = (*fit_command(trap, trap.base.store)[:3], "--run", trap.folder / "new", "--config", trap.folder / "c.yaml")
    return [fit, ("info", trap.folder / "run")]


def large_images(trap: Trap) -> Commands:
    """Small images that decode to gigabytes, and a sparse file of 40 GB."""
    (trap.folder / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(trap.folder / "images/good.jpg")
    (trap.folder / "images/wide.png").write_bytes(png_of_size(60_000, 60_000))
    (trap.folder / "images/many.png").write_bytes(png_of_size(13_000, 13_000, 13_000))
    with open(trap.folder / "images/sparse.jpg", "wb") as file:
        file.truncate(40 * 2**30)
    return [("index", "--run", trap.base.run, "--images", trap.folder / "images", "--index", trap.folder / "i", *CPU)]


CASES: dict[str, Callable[[Trap], Commands]] = {
    case.__name__: case
    for case in (
        pickled_resume,
        pickled_trial,
        pickled_weights,
        pickled_array,
        tokenizer_of_run,
        tokenizer_of_store,
        encoder_folder,
        postscript,
        zip_slips,
        zip_names,
        zip_link,
        zip_bomb,
        external_storage,
        external_link,
        virtual_dataset,
        huge_dataset,
        compressed_bomb,
        linked_embeddings,
        fifo_as_store,
        fifo_as_image,
        fifo_as_text,
        python_in_settings,
        large_images,
    )
}


REFUSED = ("zip_slips", "zip_link", "zip_bomb", "huge_dataset", "linked_embeddings", "pickled_array")


def try_case(session: Session, name: str) -> Verdict:
    """Runs the commands on a malicious file: no code runs, nothing outside is read or written, all end."""
    trap = Trap(session)
    commands = CASES[name](trap)
    before = {path: value for path, value in digests(trap.outside).items() if trap.folder not in path.parents}
    inputs = Snapshot(trap.folder)
    archives: tuple = ()
    if (trap.folder / "a.zip").exists():
        sha = hashlib.md5((trap.folder / "a.zip").read_bytes()).hexdigest()
        address = f"{session.address}/{(trap.folder / 'a.zip').relative_to(trap.base.folder)}"
        archives = ((address, sha, "Flicker8k_Dataset"),)
    environment = {"PATH": f"{trap.programs}{os.pathsep}{os.environ['PATH']}"}
    verdict = Verdict("right")
    for arguments in commands:
        command = Command(
            tuple(str(part) for part in arguments),
            folder=str(trap.folder),
            environment=environment,
            stdin=str(trap.yes),
            wait_seconds=WAIT_SECONDS,
            archives=archives,
        )
        ended = session.run(command)
        if trap.mark.exists():
            return Verdict("let in", f"{arguments[0]} ran its code")
        ended_so = ending(ended)
        if ended_so and ended_so.is_fault:
            return Verdict(ended_so.outcome, f"{arguments[0]}: {ended_so.detail}")
        if ended_so is None and name in REFUSED and arguments[0] != "info":
            return Verdict("let in", f"{arguments[0]} takes it")
        verdict = ended_so or verdict
    after = {path: value for path, value in digests(trap.outside).items() if trap.folder not in path.parents}
    if before != after:
        return Verdict("let in", f"files outside have changed: {sorted(map(str, before.keys() ^ after.keys()))}")
    for path in trap.folder.rglob("*"):
        is_new = path not in inputs.files and path.is_file()
        if is_new and path.stat().st_size < 2**24 and SECRET in path.read_bytes():
            return Verdict("let in", f"{path.relative_to(trap.folder)} holds the secret")
    return verdict
