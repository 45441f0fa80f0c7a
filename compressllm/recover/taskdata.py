"""Prompt and response records to train on: packed into rows, with labels on responses only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.recover.conversation import Encoded, encode_all
from compressllm.recover.packing import pack_records
from compressllm.recover.records import RecordConfig, Tally, read_records
from compressllm.recover.rows import TrainingData

#: Records are shuffled with this seed, not the run's: runs with different seeds hold out the same ones.
_SHUFFLE: Final = 0


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """One record a row, padded at its end to the longest of its batch.

    Args:
        records: What the rows hold.
        pad: Token id to pad with.
    """

    records: Sequence[Encoded]
    pad: int
    seqlen: None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sha256(self) -> str:
        """Hash of ids and labels."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(f"{record.ids} {record.labels()}\n".encode())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``attention_mask``, (B, longest) int64."""
        records = [self.records[index] for index in indices]
        longest = max(len(record.ids) for record in records)

        def padded(values: list[list[int]], pad: int) -> Tensor:
            return torch.tensor([row + [pad] * (longest - len(row)) for row in values])

        return {
            "input_ids": padded([record.ids for record in records], self.pad),
            "labels": padded([record.labels() for record in records], -100),
            "attention_mask": padded([[1] * len(record.ids) for record in records], 0),
        }


def load_tasks(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int,
    config: RecordConfig | None = None,
    held_out: float = 0.02,
    *,
    most_held_out: int = 64,
    max_tokens: int | None = None,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
) -> TrainingData:
    """Rows of at most ``seqlen`` tokens from JSON lines of records.

    Records are shuffled; the last of them are held out.

    Args:
        tokenizer: The student's, whose chat template is taken if it has one.
        held_out: Fraction of all tokens; at least one record.
        most_held_out: Rows' worth of tokens that are held out at most.
        max_tokens: What is to be trained on, padding included, to tell in time how many passes that takes.
        max_seqlen: The longest row the model takes, if there is a limit.
        vocab_size: Token ids must lie below it; None leaves that unchecked.

    Raises: RecipeError for settings that make no sense; CalibrationError for files that cannot be read, if no record
        is left, and for ids out of range.
    """
    config = config or RecordConfig()
    if not paths:
        raise RecipeError("records: there is no file; give one of JSON lines")
    if seqlen < 2 or (max_seqlen is not None and seqlen > max_seqlen):
        raise RecipeError(f"records: seqlen {seqlen} is not from 2 to the {max_seqlen} tokens that the model takes")
    if not 0 < held_out < 1:
        raise RecipeError(f"records: held_out is {held_out}; give a fraction between 0 and 1")
    if tokenizer is None:
        raise CalibrationError(f"{paths[0]}: the model has no tokenizer; records of text need one")
    tally = Tally()
    records = _encoded(paths, tokenizer, seqlen, config, tally)
    names = ", ".join(map(str, paths))
    if len(records) < 2:
        reasons = f": {tally}" if tally.unused else ""
        raise CalibrationError(f"{names}: {len(records)} records can be used, at least 2 are needed{reasons}")
    highest = max(max(record.ids) for record in records)
    if vocab_size is not None and highest >= vocab_size:
        raise CalibrationError(
            f"{names}: the tokenizer gives token id {highest}, the model has {vocab_size}; "
            "take the tokenizer that belongs to the model"
        )
    Random(_SHUFFLE).shuffle(records)
    cut = len(records) - _held_out(records, min(held_out * _tokens(records), most_held_out * seqlen))
    pad = next(id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if id is not None)
    train, aside = (
        pack_records(some, seqlen, pad) if config.packing else PaddedRows(some, pad)
        for some in (records[:cut], records[cut:])
    )
    tokens = len(train) * seqlen if config.packing else _tokens(records[:cut])
    passes = max_tokens / tokens if max_tokens else None
    facts: dict[str, Any] = {
        "records": [str(path) for path in paths],
        **tally.facts(),
        "settings": config.model_dump(),
        "chat_template": tokenizer.chat_template is not None,
        "seqlen": seqlen,
        "rows": len(train),
        "tokens": tokens,
        "tokens_of_records": _tokens(records[:cut]),
        "tokens_with_labels": sum(sum(record.said[1:]) for record in records[:cut]),
        "held_out": len(records) - cut,
        "passes": passes,
        "rows_sha256": train.sha256,
        "held_out_sha256": aside.sha256,
    }
    notes = [f"records: not used as they are: {tally}"] if tally.unused else []
    if tokenizer.chat_template is None:
        notes.append("records: the tokenizer has no chat template; turns are written with blank lines between")
    if passes is not None and passes > 1:
        notes.append(f"records: {tokens} tokens are fewer than are to be trained on; {passes:.1f} passes are made")
    return TrainingData(train, aside, facts, tuple(notes))


def _encoded(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, seqlen: int, config: RecordConfig, tally: Tally
) -> list[Encoded]:
    records: list[Encoded] = []
    read = [one for path in paths for one in read_records(path, config, tally)]
    encoded = encode_all([messages for _, messages in read], tokenizer)
    for (where, _), record in zip(read, encoded, strict=True):
        if isinstance(record, str):
            tally.leave_out(record, where)
        elif len(record.ids) <= seqlen:
            records.append(record)
        elif config.over_length == "drop":
            tally.leave_out(f"longer than {seqlen} tokens", where)
        elif any(record.cut(seqlen).said[1:]):
            tally.leave_out(f"cut to {seqlen} tokens", where)
            records.append(record.cut(seqlen))
        else:
            tally.leave_out(f"without an answer in the first {seqlen} tokens", where)
    tally.used = len(records)
    return records


def _held_out(records: Sequence[Encoded], tokens: float) -> int:
    """How many of the last records come to so many tokens; one at least, half of all at most."""
    count, seen = 0, 0
    while count < len(records) // 2 and seen < tokens:
        count += 1
        seen += len(records[-count].ids)
    return max(1, count)


def _tokens(records: Sequence[Encoded]) -> int:
    return sum(len(record.ids) for record in records)
