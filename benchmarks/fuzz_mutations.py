"""Ways to damage a file: any bytes, JSON, a safetensors header, a link in its place, a bomb."""

from __future__ import annotations

import gzip
import json
import os
import random
import zlib
from functools import cache
from pathlib import Path
from typing import Any

#: What a value is replaced by: of a wrong kind, too large, too deep, or the name of a file that is not its business.
AWKWARD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "2:4", "0.5", "../outside.safetensors", "/etc/passwd", "..", ".", "\x00", "\ud800", "a" * 100_000,
    "$(touch pwned)", "{{ cycler.__init__.__globals__ }}", [], {}, [[]], [-1, -1], [2**40, 2**40], ["a"], {"a": {}},
    "F64", "F8_E4M3", "BOOL", "int4-g32", "packed", "dense", "gptq", "llama", "gpt2", "bert", "float16",
)  # fmt: skip


def mutate(path: Path, chance: random.Random) -> str:
    """Damage a file, or what lies in its place, and say how."""
    ways = [flip, flip, cut, overwrite, insert, repeat, empty, swap]
    if path.suffix == ".safetensors":
        ways += [header, header, header, header, payload, payload, header_length]
    if path.suffix == ".json":
        ways += [json_value] * 5 + [json_key, json_deep]
    if path.suffix in {".gz", ".npy", ".parquet"}:
        ways += [inside_gzip, bomb] if path.suffix == ".gz" else [flip]
    if path.name == "SHA256SUMS" or path.suffix == ".yaml":
        ways += [words] * 3
    if (path.parent / "config.json").exists():  # of a text file, where a link leads is its user's to say
        ways += [instead]
    way = chance.choice(ways)
    return f"{path.name}: {way.__name__} {way(path, chance) or ''}".strip()


def flip(path: Path, chance: random.Random) -> str:
    """One to three bits."""
    data = bytearray(path.read_bytes())
    places = [chance.randrange(8 * len(data)) for _ in range(chance.choice((1, 1, 2, 3)))]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return str(places)


def cut(path: Path, chance: random.Random) -> str:
    """The end off."""
    data = path.read_bytes()
    left = chance.randrange(len(data))
    path.write_bytes(data[:left])
    return f"after {left}"


def overwrite(path: Path, chance: random.Random) -> None:
    """A stretch with noise, zeros or ones."""
    data = bytearray(path.read_bytes())
    begin, count = chance.randrange(len(data)), chance.choice((1, 2, 4, 8, 64))
    fill = chance.choice((chance.randbytes(count), b"\0" * count, b"\xff" * count))
    data[begin : begin + count] = fill[: len(data) - begin]
    path.write_bytes(data)


def insert(path: Path, chance: random.Random) -> None:
    """Noise somewhere."""
    data = path.read_bytes()
    at = chance.randrange(len(data) + 1)
    path.write_bytes(data[:at] + chance.randbytes(chance.choice((1, 8, 100))) + data[at:])


def repeat(path: Path, chance: random.Random) -> None:
    """A stretch of it once more."""
    data = path.read_bytes()
    begin, end = sorted((chance.randrange(len(data)), chance.randrange(len(data))))
    path.write_bytes(data[:end] + data[begin:])


def empty(path: Path, chance: random.Random) -> None:
    """Nothing in it."""
    path.write_bytes(b"")


def swap(path: Path, chance: random.Random) -> str:
    """What is in another file of the folder."""
    other = chance.choice(sorted(one for one in path.parent.iterdir() if one.is_file()))
    path.write_bytes(other.read_bytes())
    return f"with {other.name}"


def instead(path: Path, chance: random.Random) -> str:
    """Something else in its place: a link out of the folder, to itself or to a device; a pipe, a folder, nothing."""
    path.unlink()
    kind = chance.choice(("outside", "absolute", "device", "itself", "dangling", "pipe", "folder", "nothing"))
    links = {
        "outside": f"../outside{path.suffix}",
        "absolute": "/etc/passwd",
        "device": "/dev/zero",
        "itself": path.name,
        "dangling": "no-such-file",
    }
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return kind


def json_value(path: Path, chance: random.Random) -> str:
    """One value, anywhere in it, by an awkward one."""
    root = json.loads(path.read_text())
    where, places = root, list(_places(root))
    if not places:
        return flip(path, chance)
    where, key = chance.choice(places)
    where[key] = chance.choice(AWKWARD)
    _write_json(path, root)
    return f"{key}={str(where[key])[:40]!r}"


def json_key(path: Path, chance: random.Random) -> str:
    """One key left out, or under another name."""
    root = json.loads(path.read_text())
    where, key = chance.choice([(at, name) for at, name in _places(root) if isinstance(at, dict)] or [(root, None)])
    if key is not None:
        value = where.pop(key)
        if chance.random() < 0.5:
            where[chance.choice(("auto_map", "x", "../x", "\x00", key.upper(), "__metadata__"))] = value
    _write_json(path, root)
    return str(key)


def json_deep(path: Path, chance: random.Random) -> None:
    """Brackets without end."""
    path.write_text(chance.choice(("[", '{"a":')) * chance.choice((100, 3_000, 100_000)))


def header(path: Path, chance: random.Random) -> str:
    """A safetensors header changed as JSON, its length right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    name = chance.choice(sorted(entries.keys() - {"__metadata__"}))
    entry, others = entries[name], sorted(entries.keys() - {"__metadata__", name})
    begin, end = entry["data_offsets"]
    kind = chance.choice(("dtype", "shape", "turn", "offsets", "overlap", "shift", "drop", "rename", "any", "many"))
    if kind == "dtype":
        entry["dtype"] = chance.choice(("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E5M2", "Q4", "", 7))
    elif kind == "shape":
        entry["shape"] = chance.choice(([], [0], [1], [2**31, 2**31], [-1, -1], [*entry["shape"], 1], ["4"], None))
    elif kind == "turn":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "offsets":
        entry["data_offsets"] = chance.choice(([end, begin], [begin, 2**62], [-8, end], [begin], [0, 0], [1e3, 2e3]))
    elif kind == "overlap" and others:
        entry["data_offsets"] = entries[chance.choice(others)]["data_offsets"]
    elif kind == "shift":
        entry["data_offsets"] = [begin + 4, end + 4]
    elif kind == "drop":
        del entries[name]
    elif kind == "rename":
        entries[chance.choice((*others, "../x", "model.layers.9.weight", "\x00"))] = entries.pop(name)
    elif kind == "any":
        where, key = chance.choice(list(_places(entries)))
        where[key] = chance.choice(AWKWARD)
    elif kind == "many":
        entries |= {f"{name}.{number}": entry for number in range(2_000)}
    text = json.dumps(entries).encode("utf-8", "replace")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"{kind} of {name}"


def header_length(path: Path, chance: random.Random) -> str:
    """The length a safetensors file says its header has; at times with that much in it."""
    data = path.read_bytes()
    length = chance.choice((0, 1, 7, len(data), len(data) - 8, 2**24, 2**24 + 1, 100_000_000, 2**63, 2**64 - 1))
    filler = b"[" * min(length, 2**16) if chance.random() < 0.3 else b""
    path.write_bytes(length.to_bytes(8, "little") + filler + data[8:])
    if chance.random() < 0.3 and length < 2**28:
        os.truncate(path, length + 16)  # as long as it says, and hardly any of it on disk
    return str(length)


def payload(path: Path, chance: random.Random) -> str:
    """A tensor's bytes: NaN, infinity, all bits, none."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    name = chance.choice(sorted(entries.keys() - {"__metadata__"}))
    begin, end = (8 + length + at for at in entries[name]["data_offsets"])
    fill = chance.choice((b"\xc0\x7f", b"\x80\xff", b"\xff\xff", b"\x00\x00", b"\x00\x80", b"\x01\x00", b"\xaa\x55"))
    count = chance.choice((2, 64, end - begin))
    data[begin : min(end, begin + count)] = (fill * (end - begin))[: min(end - begin, count)]
    path.write_bytes(data)
    return f"{fill.hex()} in {name}"


def inside_gzip(path: Path, chance: random.Random) -> None:
    """What a gzip file holds, and packed again."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    for _ in range(chance.choice((1, 5))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(gzip.compress(bytes(data)))


def bomb(path: Path, chance: random.Random) -> None:
    """A few hundred kilobytes that unpack to a quarter of a gigabyte."""
    path.write_bytes(_bomb(chance.choice((b"\0", b"a", b'{"text": "a"}\n', b"["))))


@cache
def _bomb(text: bytes) -> bytes:
    packer, block = zlib.compressobj(1, wbits=31), text * (1 << 16)
    return b"".join(packer.compress(block) for _ in range((1 << 28) // len(block))) + packer.flush()


def words(path: Path, chance: random.Random) -> None:
    """Parts of a text in another order, left out, or replaced."""
    parts = path.read_text().split(" ")
    awkward = (
        "../x",
        "*how",
        "&how",
        "!!python/object:os.system",
        "<<:",
        "[" * 500,
        "\t",
        "\n",
        ": ",
        "- ",
        "0" * 5_000,
    )
    for _ in range(chance.choice((1, 2, 5))):
        parts[chance.randrange(len(parts))] = chance.choice((*awkward, *parts))
    path.write_text(" ".join(parts))


def _places(value: Any) -> Any:
    """Every container in plain data, with each of its keys or indices."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value).encode("utf-8", "replace"))
