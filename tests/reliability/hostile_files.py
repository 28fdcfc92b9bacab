"""Malicious files that reach outside, wait for ever or unpack without end: archives, HDF5, FIFOs, images."""

import io
import os
import shutil
import zipfile
from collections.abc import Callable

import h5py
import numpy as np
from PIL import Image

from reliability.images import png_of_size
from reliability.traps import CPU, QUERY, SECRET, Commands, Trap, extract_command, fit_command


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


def large_images(trap: Trap) -> Commands:
    """Small images that decode to gigabytes, and a sparse file of 40 GB."""
    (trap.folder / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(trap.folder / "images/good.jpg")
    (trap.folder / "images/wide.png").write_bytes(png_of_size(60_000, 60_000))
    (trap.folder / "images/many.png").write_bytes(png_of_size(13_000, 13_000, 13_000))
    with open(trap.folder / "images/sparse.jpg", "wb") as file:
        file.truncate(40 * 2**30)
    return [("index", "--run", trap.base.run, "--images", trap.folder / "images", "--index", trap.folder / "i", *CPU)]
