"""A teacher's answers on disk, so that it runs once however often its text is trained on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressllm.core.atomic import sync, write_json
from compressllm.core.errors import FormatError, RecipeError, RunError
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle
from compressllm.models.shards import file_sha256
from compressllm.recover.headchunks import TeacherTopK
from compressllm.recover.rows import Rows
from compressllm.recover.teacher import ResidentTeacher
from compressllm.recover.topk import top_k

_SHARD_TOKENS: Final = 1 << 16  # what an interrupted build loses at most
_FACTS: Final = "teacher-cache.json"


class TeacherCache:
    """A finished cache: for every position of every row a `TeacherTopK`.

    Args:
        folder: Of this cache.
        facts: What it was made of, and the mass its top k hold.

    Raises: FormatError if the cache is damaged.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self._rows = _rows_a_shard(facts)
        self._shards: dict[int, Any] = {}

    def at(self, rows: Sequence[int]) -> TeacherTopK:
        """The answers at all positions of some rows, one row after another: (len(rows) * seqlen, k)."""
        parts = [self._row(*divmod(row, self._rows)) for row in rows]
        ids, logprobs, tail = (torch.cat(part) for part in zip(*parts, strict=True))
        return TeacherTopK(ids, logprobs, tail)

    def _row(self, shard: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        path = self.folder / _shard_name(shard)
        try:
            if shard not in self._shards:
                self._shards[shard] = safe_open(path, "pt")
            tensors = [self._shards[shard].get_slice(name)[row] for name in ("ids", "logprobs", "tail")]
        except (SafetensorError, OSError, IndexError) as error:
            raise FormatError(f"{path}: is damaged ({error}); delete {self.folder}, it is made anew") from None
        return tensors[0].int(), tensors[1].float(), tensors[2].float()


def open_cache(
    root: Path,
    teacher: Bundle,
    rows: Rows,
    load: Callable[[], ResidentTeacher],
    run: Run,
    *,
    k: int = 64,
    batch: int = 4,
) -> TeacherCache:
    """The cache of a teacher's answers to ``rows``, made or finished first if it is not whole.

    It lies in a folder of ``root`` that is named by a hash of all it depends on: other weights, tokens, rows or k make
    another cache and never read this one. A killed build goes on with the shard it was at.

    Args:
        teacher: Its checkpoint and tokenizer.
        load: Puts the teacher into memory; not called if the cache is whole.
        k: Tokens kept a position.
        batch: Rows in one forward of the teacher.

    Raises: RecipeError for rows of different lengths; RunError if the disk is too small; FormatError if the cache is
        damaged.
    """
    key = _key(teacher, rows, min(k, teacher.vocab_size - 1))
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return run.ranks.first_then_rest(lambda: _open(folder, key, rows, load, run, batch))


def _open(
    folder: Path, key: dict[str, Any], rows: Rows, load: Callable[[], ResidentTeacher], run: Run, batch: int
) -> TeacherCache:
    made = _finished(folder, key)
    if made is not None:
        return TeacherCache(folder, made)
    each = _rows_a_shard(key)
    shards = math.ceil(len(rows) / each)
    missing = [shard for shard in range(shards) if not (folder / _shard_name(shard)).exists()]
    _make_room(folder, key, len(missing) * each)
    teacher = load() if missing else None
    for shard in run.track(missing, len(missing), "teacher"):
        if teacher is not None:
            _write(folder / _shard_name(shard), _answers(teacher, rows, key, shard * each, each, batch))
    captured = sum(_captured(folder / _shard_name(shard)) for shard in range(shards)) / (len(rows) * key["seqlen"])
    facts = key | {"captured_mass": captured}
    write_json(folder / _FACTS, facts)
    return TeacherCache(folder, facts)


def _answers(
    teacher: ResidentTeacher, rows: Rows, key: Mapping[str, Any], first: int, count: int, batch: int
) -> dict[str, Tensor]:
    """The tensors of one shard, each with a row a row."""
    parts: list[TeacherTopK] = []
    stop = min(first + count, len(rows))
    for start in range(first, stop, batch):
        answer = teacher(rows.batch(range(start, min(start + batch, stop)))).head
        parts.append(top_k(answer.hidden, answer.head, key["k"]))
    ids, logprobs, tail = (
        torch.cat([getattr(part, name).cpu() for part in parts]).view(stop - first, key["seqlen"], *shape)
        for name, shape in (("ids", (key["k"],)), ("logprobs", (key["k"],)), ("tail", ()))
    )
    return {
        "ids": ids.to(torch.uint16 if key["vocab_size"] <= 1 << 16 else torch.int32),
        "logprobs": logprobs.half(),
        "tail": tail.half(),
    }


def _key(teacher: Bundle, rows: Rows, k: int) -> dict[str, Any]:
    """All that the answers depend on."""
    if rows.seqlen is None:
        raise RecipeError("teacher cache: rows are of different lengths; pack them, or do without the cache")
    if teacher.checkpoint is None:
        raise RecipeError("teacher cache: the teacher is not a checkpoint, so nothing tells whether it changed")
    files = [teacher.checkpoint.folder / "config.json", *teacher.checkpoint.files]
    vocab = sorted(teacher.tokenizer.get_vocab().items()) if teacher.tokenizer else None
    return {
        "version": 1,
        "teacher_sha256": {path.name: file_sha256(path) for path in files},
        "tokenizer_sha256": hashlib.sha256(json.dumps(vocab).encode()).hexdigest(),
        "rows_sha256": rows.sha256,
        "rows": len(rows),
        "seqlen": rows.seqlen,
        "vocab_size": teacher.vocab_size,
        "k": k,
        "shard_tokens": _SHARD_TOKENS,
    }


def _finished(folder: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The facts of a whole cache, or None if it is not whole. Raises FormatError if they contradict its name."""
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FormatError(f"{folder / _FACTS}: is damaged ({error}); delete {folder}, it is made anew") from None
    if differs := [name for name in key if facts.get(name) != key[name]]:
        raise FormatError(f"{folder / _FACTS}: was made of another {', '.join(differs)}; delete {folder}")
    return facts


def _make_room(folder: Path, key: Mapping[str, Any], rows: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    each = key["k"] * (2 + (2 if key["vocab_size"] <= 1 << 16 else 4)) + 2
    needed, free = rows * key["seqlen"] * each, shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: the teacher's answers take {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; "
            "make room, keep fewer tokens a position, or do without the cache"
        )


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard appears whole or not at all."""
    captured = float((1 - tensors["tail"].double().exp()).sum())
    scratch = path.with_name(f".{path.name}-{os.getpid()}.partial")  # others may be making the same
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, scratch, {"captured": repr(captured)})
    except SafetensorError as error:  # what its writer makes of a full disk
        scratch.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error}); make room, and the same command goes on") from None
    sync(scratch)
    os.replace(scratch, path)


def _captured(path: Path) -> float:
    """Summed over a shard's positions, the probability that their top k have."""
    try:
        with safe_open(path, "pt") as file:
            return float(file.metadata()["captured"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: is damaged ({error}); delete it, it is made anew") from None


def _rows_a_shard(key: Mapping[str, Any]) -> int:
    return max(1, int(key["shard_tokens"]) // int(key["seqlen"]))


def _shard_name(shard: int) -> str:
    return f"answers-{shard:05d}.safetensors"
