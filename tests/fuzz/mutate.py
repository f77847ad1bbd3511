"""Inputs near a valid one: a value of its JSON, header, pickle or lines is replaced."""

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**31 - 1, -(2**31), 2**63, 2**64, 10**400,
    0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "\0", "\ud800", "😀", "../x", "/etc/passwd", "x" * 5000,
    [], {}, [None], [[]], {"": None}, [1, 2], "auto", "full", "1", "nan", "F32", "cpu", "cuda:9",
]  # fmt: skip


def mutate(name: str, content: bytes, chance: random.Random) -> bytes | None:
    """Return the content of a file changed by its kind; None where the file is not of the kind."""
    kinds: dict[str, Callable[[bytes, random.Random], bytes]] = {
        ".json": _json, ".jsonl": _lines, ".safetensors": _header, ".ckpt": _zip, ".bin": _zip,
        ".conllu": _cells, ".txt": _cells, ".pairs": _lines,
    }  # fmt: skip
    change = kinds.get(PurePath(name).suffix)
    if change is None:
        return None
    try:
        return change(content, chance)
    except Exception:  # content that is not of the kind raises anything
        return None


def _json(content: bytes, chance: random.Random) -> bytes:
    tree = [json.loads(content)]
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        _change(tree, chance)
    return json.dumps(tree[0]).encode("utf-8", "surrogatepass")


def _change(tree: Any, chance: random.Random) -> None:
    """Change one value of a tree of lists and dicts, in place."""
    places: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack and len(places) < 5000:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    node, key = chance.choice(places)
    what = chance.randrange(8)
    if what == 0 and node is not tree:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[chance.choice(["", "x", "metadata", "type", str(key) + "2"])] = node[key]
    elif what == 2 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = node[key] * chance.choice([-1, 2, 10**6, 0, 0.5]) + chance.choice([0, 1, -1])
    elif what == 3:
        other, at = chance.choice(places)
        node[key] = json.loads(json.dumps(other[at]))
    elif what == 4 and node is not tree:
        node[key] = [node[key]]
    else:
        node[key] = chance.choice(ODD)


def _lines(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    what = chance.randrange(4)
    if what == 0:
        lines.insert(at, chance.choice(lines))
    elif what == 1:
        del lines[at]
    else:
        lines[at] = _json(lines[at], chance)
    return b"\n".join(lines)


def _header(content: bytes, chance: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + size], content[8 + size :]
    if chance.random() < 0.8:
        header = _json(header, chance)
    if chance.random() < 0.3:
        rest = rest[: chance.randrange(len(rest) + 1)] + bytes(chance.randrange(9))
    return struct.pack("<Q", len(header)) + header + rest


def _zip(content: bytes, chance: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    name = chance.choice(list(entries))
    if chance.random() < 0.8:
        name = next(each for each in entries if each.endswith("data.pkl"))
    raw = bytearray(entries[name])
    for _ in range(chance.choice([1, 1, 2, 5])):
        at, what = chance.randrange(len(raw)), chance.randrange(5)
        if what == 0:
            raw[at] = chance.randrange(256)
        elif what == 1:
            del raw[at : at + chance.randrange(1, 9)]
        elif what == 2:
            raw[at:at] = bytes(chance.choices(raw, k=chance.randrange(1, 9)))
        elif what == 3:
            start = chance.randrange(len(raw))
            raw[at:at] = raw[start : start + chance.randrange(1, 40)]
        else:
            raw[at] = ord(chance.choice("(.]}tRbsuaeq0NKJMGXUcoi\x80\x81\x85\x86\x87\x93\x94h"))
        raw = raw or bytearray(b".")
    entries[name] = bytes(raw)
    if chance.random() < 0.05:
        del entries[chance.choice(list(entries))]
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as new:
        for each, whole in entries.items():
            new.writestr(each, whole)
    return written.getvalue()


def _cells(content: bytes, chance: random.Random) -> bytes:
    parts = re.split(rb"([\t\n])", content)
    odd = [b"", b"0", b"-1", b"1-2", b"2.1", b"9" * 5000, b"x", b"_", b"\xff", b"|", b"=", b"1-",
           b"# text = x", "😀".encode(), b"\0", b"SpaceAfter=No", b"3-1", b"1.", b"\r"]  # fmt: skip
    at, what = chance.randrange(len(parts)), chance.randrange(4)
    if what == 0:
        del parts[at]
    elif what == 1:
        parts.insert(at, chance.choice(parts))
    else:
        parts[at] = chance.choice([*odd, chance.choice(parts)])
    return b"".join(parts)
