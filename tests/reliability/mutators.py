"""Seeded damage to bytes of any kind, and to arrays."""

import random
from collections.abc import Callable

import numpy as np

BOUNDARIES = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"BM",
    b"RIFF",
    b"II*\0",
    b"\x89HDF\r\n\x1a\n",
    b"PK\3\4",
)
MAGIC += (b"\x93NUMPY", b"%!PS-Adobe-3.0\n", b"\x80\x04", b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 8)


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """Damages bytes in one of the ways of ``BYTE_MUTATORS``, sometimes twice."""
    for _ in range(generator.choice((1, 1, 1, 2))):
        data = generator.choice(BYTE_MUTATORS)(data, generator) if data else b"\0"
    return data


def flip_bit(data: bytes, generator: random.Random) -> bytes:
    """Flips one bit."""
    return flip_bits(data, generator, 1)


def flip_bits(data: bytes, generator: random.Random, count: int | None = None) -> bytes:
    """Flips some bits."""
    changed = bytearray(data)
    for _ in range(count or generator.randint(2, 30)):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def zero_run(data: bytes, generator: random.Random) -> bytes:
    """Zeroes a run of bytes."""
    start, size = generator.randrange(len(data)), generator.choice((1, 8, 64, 512, 4096))
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def truncate(data: bytes, generator: random.Random) -> bytes:
    """Cuts the end off."""
    return data[: generator.choice((0, 1, len(data) // 2, len(data) - 1, generator.randrange(len(data))))]


def duplicate(data: bytes, generator: random.Random) -> bytes:
    """Repeats a run of bytes."""
    start, size = generator.randrange(len(data)), generator.choice((1, 16, 256, 4096))
    return data[: start + size] + data[start : start + size] + data[start + size :]


def insert(data: bytes, generator: random.Random) -> bytes:
    """Inserts random bytes."""
    start = generator.randrange(len(data) + 1)
    return data[:start] + generator.randbytes(generator.choice((1, 4, 100))) + data[start:]


def swap(data: bytes, generator: random.Random) -> bytes:
    """Swaps two runs of bytes."""
    size = min(generator.choice((1, 4, 64)), len(data) // 2)
    first, second = sorted(generator.sample(range(max(2, len(data) - size)), 2))
    if second - first < size:
        return data
    runs = data[second : second + size], data[first + size : second], data[first : first + size]
    return data[:first] + b"".join(runs) + data[second + size :]


def put_magic(data: bytes, generator: random.Random) -> bytes:
    """Puts the first bytes of another format in front."""
    magic = generator.choice(MAGIC)
    return magic + data[len(magic) :]


def put_integer(data: bytes, generator: random.Random) -> bytes:
    """Puts an integer at the edge of its range somewhere."""
    size = generator.choice((2, 4, 8))
    value = generator.choice(BOUNDARIES) % 256**size
    start = generator.randrange(len(data))
    return data[:start] + value.to_bytes(size, generator.choice(("little", "big"))) + data[start + size :]


BYTE_MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bit,
    flip_bits,
    zero_run,
    truncate,
    duplicate,
    insert,
    swap,
    put_magic,
    put_integer,
)


def mutate_array(data: bytes, generator: random.Random) -> bytes:
    """Damages a .npy file, its header more often than its values."""
    if generator.random() < 0.4:
        return mutate_bytes(data, generator)
    size = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + size].decode("latin-1")
    pieces = (
        ("<f4", generator.choice((">f4", "<f8", "<f2", "|O", "<i4", "|V4", "<U3", "<c8", "junk"))),
        ("False", generator.choice(("True", "None", "1"))),
        ("24", generator.choice(("-24", "2**40", "99999999999999", "0", "24.0", "23"))),
        ("48", generator.choice(("-48", "1099511627776", "0", "47"))),
        ("{", generator.choice(("", "(" * 300, "{'x': 1, ", "__import__('os'),{"))),
        ("descr", generator.choice(("", "DESCR", "d\0"))),
    )
    old, new = generator.choice(pieces)
    header = header.replace(old, new, 1)
    return data[:8] + len(header.encode("latin-1")).to_bytes(2, "little") + header.encode("latin-1") + data[10 + size :]


def odd_array(generator: random.Random) -> np.ndarray:
    """A well-formed array that is not a table of features."""
    choices = (
        np.zeros((0, 12), np.float32),
        np.zeros((24, 0), np.float32),
        np.full((24, 12), np.nan, np.float32),
        np.full((24, 12), 1e38, np.float32),
        np.zeros(24, np.float32),
        np.zeros((24, 2, 2, 12), np.float32),
        np.zeros((24, 12), np.complex64),
        np.zeros((24, 12), "U4"),
        np.zeros((24, 12), bool),
        np.zeros((), np.float32),
        np.asfortranarray(np.ones((24, 12), np.float32)),
        np.ones((24, 12), ">f4"),
    )
    return generator.choice(choices)
