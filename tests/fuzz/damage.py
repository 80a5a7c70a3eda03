"""Seeded damage to a directory of files: by disks, networks, other tools, and by people who mean it."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = "[" * 200_000 + "]" * 200_000
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 10**20, -(10**20), 0.5, float("nan"), float("inf"), "", "x", "../x", "\0",
    "(a+)+$", [], {}, [None], [[]], {"a": 1}, ["x"] * 3, [2**62, 2**62], [0, 0], [-1, 4], "F32", "é\n\x1b[31m",
)  # fmt: skip
TEXTS = (
    "",
    "{",
    "null",
    "true",
    "3",
    '"x"',
    "[]",
    "{}",
    DEEP,
    '{"a": ' + DEEP + "}",
    '{"a": 1, "a": 1}',
    "\xff\xfe",
    "NaN",
)


def flip(files: list[Path], rng: random.Random) -> str:
    """One to eight bits in one file."""
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[_place(len(data), rng)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"flip bits in {path.name}"


def overwrite(files: list[Path], rng: random.Random) -> str:
    """A stretch of one file with zeros, ones or noise."""
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    start = _place(len(data), rng)
    stop = min(len(data), start + rng.choice((1, 8, 64, 512, 4096)))
    data[start:stop] = rng.choice((bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)))
    path.write_bytes(data)
    return f"overwrite {start}:{stop} of {path.name}"


def cut(files: list[Path], rng: random.Random) -> str:
    path = rng.choice(files)
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice((0, 1, 8, len(data) - 1, rng.randrange(len(data)), len(data) // 2))])
    return f"cut {path.name}"


def extend(files: list[Path], rng: random.Random) -> str:
    path = rng.choice(files)
    with open(path, "ab") as file:
        file.write(rng.choice((b"\0", b"\n", b"x" * 100, rng.randbytes(5000), path.read_bytes())))
    return f"extend {path.name}"


def move_bytes(files: list[Path], rng: random.Random) -> str:
    """Take bytes out of a file, or put some in: all that follows is elsewhere."""
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    start = _place(len(data), rng)
    if rng.random() < 0.5:
        del data[start : start + rng.choice((1, 4, 64))]
    else:
        data[start:start] = rng.randbytes(rng.choice((1, 4, 64)))
    path.write_bytes(data)
    return f"shift {path.name} at {start}"


def swap(files: list[Path], rng: random.Random) -> str:
    """Two files, each under the other's name."""
    if len(files) < 2:
        return cut(files, rng)
    one, other = rng.sample(files, 2)
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    return f"swap {one.name} and {other.name}"


def no_file(files: list[Path], rng: random.Random) -> str:
    """Something else where a file was."""
    path = rng.choice(files)
    path.unlink()
    kind = rng.choice(("nothing", "fifo", "directory", "dangling", "loop", "device", "endless"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("not/there")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "endless":
        with open(path, "wb") as file:
            file.truncate(1 << 40)  # a hole, as large as a disk
    return f"{kind} for {path.name}"


def hostile_text(files: list[Path], rng: random.Random) -> str:
    """Other JSON, or none, where there was JSON."""
    path = rng.choice(_json_files(files) or files)
    text = rng.choice(TEXTS)
    _write_json_text(path, text)
    return f"{text[:20]!r} for the JSON of {path.name}"


def hostile_value(files: list[Path], rng: random.Random) -> str:
    """One value somewhere in a file's JSON is another, is gone, or is there twice."""
    path = rng.choice(_json_files(files) or files)
    try:
        value = json.loads(_json_text(path))
    except ValueError:
        return cut([path], rng)
    places = list(_places(value))
    if not places:
        return hostile_text([path], rng)
    holder, key = rng.choice(places)
    if rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = rng.choice(HOSTILE)
    _write_json_text(path, json.dumps(value))
    return f"{key!r} in {path.name}"


ALL: tuple[Callable[[list[Path], random.Random], str], ...] = (
    flip, flip, overwrite, cut, extend, move_bytes, swap, no_file, hostile_text, hostile_value, hostile_value,
    hostile_value,
)  # fmt: skip

FORGED: tuple[Callable[[list[Path], random.Random], str], ...] = (hostile_text, *[hostile_value] * 5)
"""For files whose checksums are made to fit again."""


def _place(size: int, rng: random.Random) -> int:
    """Anywhere; half the time near the start, where headers are."""
    return rng.randrange(min(size, 600) if rng.random() < 0.5 else size) if size else 0


def _json_files(files: list[Path]) -> list[Path]:
    return [path for path in files if path.suffix in (".json", ".safetensors")]


def _json_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data.decode(errors="replace")
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode(errors="replace")


def _write_json_text(path: Path, text: str) -> None:
    """Into a safetensors file as a header of the right length."""
    new = text.encode("latin-1" if text == "\xff\xfe" else "utf-8", errors="surrogatepass")
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        new = struct.pack("<Q", len(new)) + new + data[8 + length :]
    path.write_bytes(new)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder and key or index in a JSON value."""
    found, todo = [], [value]
    while todo:
        holder = todo.pop()
        if isinstance(holder, dict):
            inside = list(holder.items())
        else:
            inside = list(enumerate(holder)) if isinstance(holder, list) else []
        found += [(holder, key) for key, _ in inside]
        todo += [inner for _, inner in inside]
    return found


def copy(source: Path, target: Path) -> list[Path]:
    """A directory to damage; returns its files."""
    shutil.copytree(source, target)
    return sorted(path for path in target.rglob("*") if path.is_file())
