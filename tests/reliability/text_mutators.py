"""Seeded damage to JSON, YAML and tables of captions: what is nasty in each, and plain bytes."""

import csv
import io
import json
import random

import yaml

from reliability.mutators import mutate_bytes

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
        return mutate_bytes(value.encode("utf-8", "surrogatepass"), generator).decode("utf-8", "surrogateescape")
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
