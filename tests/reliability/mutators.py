"""Seeded damage to files: bytes of any kind, and what is nasty in JSON, YAML and tables of captions."""

import csv
import io
import json
import random
from collections.abc import Callable

import numpy as np
import yaml

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

ODD_VALUES = (
    None,
    True,
    0,
    -1,
    1,
    2**63,
    -(2**63) - 1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\ud800",
    "../../../etc/passwd",
    "x" * 300,
    "é" * 200,
    [],
    {},
    [[]],
    {"a": {"b": []}},
)


def mutate_json(text: str, generator: random.Random) -> bytes:
    """Damages JSON: values of wrong types, missing and double keys, depth, and plain bytes."""
    way = generator.randrange(10)
    if way == 0:
        return mutate_bytes(text.encode(), generator)
    if way == 1:
        depth = generator.choice((500, 5000, 100_000))
        opening = generator.choice(("[", '{"a":'))
        return (opening * depth + "1" + ("]" if opening == "[" else "}") * depth).encode()
    if way == 2:
        return generator.choice((b"", b"null", b"[]", b"1", b'"text"', b"{}", b"\xff\xfe{\0}\0", b"{} {}", b"NaN"))
    if way == 3:
        position = generator.randrange(len(text))
        return (text[:position] + "9" * 5000 + text[position:]).encode()
    value = json.loads(text)
    for _ in range(generator.choice((1, 1, 3))):
        value = mutate_value(value, generator)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_value(value, generator: random.Random):
    """Changes one part of a nested value."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        changed = dict(value)
        key = generator.choice(list(changed))
        way = generator.random()
        if way < 0.2:
            del changed[key]
        elif way < 0.3:
            changed[generator.choice(("", "x", "\ud800", key + " "))] = changed.pop(key)
        else:
            changed[key] = mutate_value(changed[key], generator)
        return changed
    if isinstance(value, list) and value and generator.random() < 0.8:
        changed = list(value)
        position = generator.randrange(len(changed))
        way = generator.random()
        if way < 0.2:
            del changed[position]
        elif way < 0.4:
            changed.insert(position, changed[position])
        else:
            changed[position] = mutate_value(changed[position], generator)
        return changed
    if isinstance(value, str) and value and generator.random() < 0.5:
        return mutate_bytes(value.encode(), generator).decode("utf-8", "surrogateescape")
    return generator.choice(ODD_VALUES)


YAML_PIECES = (
    "!!python/object/apply:os.system ['touch canary']",
    "!!float abc",
    "!!int x",
    "!!timestamp z",
    "!!binary ////",
    "!!set {a, b}",
    "2024-99-99",
    "1" * 5000,
    "1" + "0" * 400,
    "0x" + "f" * 400,
    "1e25",
    ".inf",
    ".nan",
    "-1",
    "[" * 3000,
    "{a: " * 1500,
    "*unknown",
    "&a [*a]",
    "<<: 1",
    "'\\ud800'",
    "1:2:3",
    "\t- x",
    "99999999999",
    "~",
    "[]",
    "{}",
    '"\\0"',
    "é" * 300,
)


def alias_bomb(levels: int = 9) -> str:
    """YAML of a few hundred bytes whose value has 10 to the power of ``levels`` parts."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        repeated = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{repeated}]")
    return "\n".join(lines) + f"\nmodel:\n  temperature: *a{levels - 1}\n"


def mutate_yaml(text: str, generator: random.Random) -> bytes:
    """Damages settings in YAML."""
    way = generator.randrange(8)
    if way == 0:
        return mutate_bytes(text.encode(), generator)
    if way == 1:
        return alias_bomb(generator.randint(2, 9)).encode()
    if way == 2:
        position = generator.randrange(len(text))
        return (text[:position] + generator.choice(YAML_PIECES) + text[position:]).encode()
    if way == 3:
        return yaml.safe_dump(mutate_value(yaml.safe_load(text), generator)).encode()
    lines = text.splitlines()
    position = generator.randrange(len(lines))
    name = lines[position].partition(":")[0]
    lines[position] = f"{name}: {generator.choice(YAML_PIECES)}"
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


ODD_CELLS = (
    "",
    " ",
    '"',
    '""',
    ",",
    "a\nb",
    "a\rb",
    "\0",
    "../../../etc/passwd",
    "/etc/passwd",
    "images/../images/0001.jpg",
    "n" * 300 + ".jpg",
    "n" * 200_000,
    "\ud800",
    "\u202e\u200b",
    "💥" * 50,
    "=1+1",
    "train",
    "nosplit",
    "images",
    ".",
    "-",
)


def mutate_table(text: str, generator: random.Random) -> bytes:
    """Damages a table of captions: line ends, quotes, encodings, rows, cells, columns."""
    way = generator.randrange(12)
    if way == 0:
        return mutate_bytes(text.encode(), generator)
    if way == 1:
        return text.replace("\n", generator.choice(("\r", "\r\n", "\n\n", "\n\r"))).encode()
    if way == 2:
        return generator.choice((b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"\0", b"#", b"x" * 140_000)) + text.encode()
    if way == 3:
        return text.replace("e", "é").encode(generator.choice(("latin-1", "utf-16", "utf-16-le", "utf-8-sig")))
    if way == 4:
        return text.replace(",", generator.choice((";", "\t", ",,", "|", ", "))).encode()
    rows = list(csv.reader(io.StringIO(text)))
    for _ in range(generator.choice((1, 1, 2, 5))):
        row = generator.choice(rows)
        position = generator.randrange(len(row)) if row else 0
        if way == 5:
            rows.remove(row)
        elif way == 6:
            rows.insert(generator.randrange(len(rows)), list(row))
        elif way == 7 and row:
            del row[position]
        elif way == 8:
            row.insert(position, generator.choice(ODD_CELLS))
        elif row:
            row[position] = generator.choice(ODD_CELLS)
        rows = rows or [[]]
    output = io.StringIO()
    csv.writer(output, lineterminator="\n", escapechar="\\").writerows(rows)
    return output.getvalue().encode("utf-8", "surrogatepass")


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
