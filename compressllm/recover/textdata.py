"""Token windows of many text sources to train on, and a slice of them held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressllm.calibration.cutting import pack, special_tokens
from compressllm.calibration.source import describe_source, open_source
from compressllm.calibration.tokenids import TokenIds
from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.core.registry import Spec
from compressllm.recover.rows import TrainingData, tensors_sha256

_DOCUMENTS_AT_ONCE: Final = 64  # fast tokenizers take a list on all cores
#: Documents are shuffled with this seed, not the run's: runs with different seeds hold out the same text.
_SHUFFLE: Final = 0
#: Tokens that are made of one source at most, unless more are to be trained on: of a web crawl a shard has 160 million.
_MOST_TOKENS: Final = 20_000_000


@dataclass(frozen=True, eq=False)
class TextRows:
    """Windows of packed text: every position but the last predicts the token after it.

    Args:
        ids: (n, seqlen) int32.
    """

    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return self.ids.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the ids."""
        return tensors_sha256(self.ids)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, (B, seqlen) int64."""
        ids = self.ids[torch.as_tensor(indices)].long()
        return {"input_ids": ids, "labels": next_tokens(ids)}


def next_tokens(ids: Tensor) -> Tensor:
    """(B, S) labels: the token after each position, -100 at the last."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels


def load_text(
    sources: Sequence[Spec],
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int,
    shares: Sequence[float] = (),
    held_out: float = 0.02,
    *,
    most_held_out: int = 64,
    max_tokens: int | None = None,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
) -> TrainingData:
    """Windows of ``seqlen`` tokens from anything `open_source` takes; of sets with two parts, the calibration part.

    The documents of a source are shuffled, tokenised one by one with the tokenizer's default special tokens, packed
    with EOS between them, and cut end to end; what is left over is dropped. The last windows of each source are
    held out. Of a very large source only as many documents are taken as can be needed.

    Args:
        tokenizer: The student's; None will do for token ids.
        shares: Of the windows, how many come from each source; in proportion to their length if empty.
        held_out: Fraction of all windows; at least one of each source that has two.
        most_held_out: As many windows at most, but for that one a source: looking at them takes time as well.
        max_tokens: What is to be trained on, to tell in time how many passes that takes.
        max_seqlen: The longest window the model takes, if there is a limit.
        vocab_size: Token ids must lie below it; None leaves that unchecked.

    Raises: RecipeError for settings that make no sense; CalibrationError for text that cannot be had, is too short,
        or whose ids are out of range.
    """
    _check(sources, seqlen, shares, held_out, max_seqlen)
    most = max(_MOST_TOKENS, 2 * (max_tokens or 0))
    read = [_read(spec, tokenizer, seqlen, vocab_size, most) for spec in sources]
    sizes = [len(one.ids) for one in read]
    total = sum(sizes)
    parts = [share / sum(shares) for share in shares] or [size / total for size in sizes]
    aim = min(held_out * total, most_held_out)
    apart = [min(size // 2, max(1, round(aim * part))) for size, part in zip(sizes, parts, strict=True)]
    if not sum(apart):
        raise CalibrationError(
            f"data: {', '.join(one.name for one in read)}: 1 window of {seqlen} tokens each; one to train on and one "
            "to hold out are needed; give more text or a smaller seqlen"
        )
    left = [size - aside for size, aside in zip(sizes, apart, strict=True)]
    taken = [max(1, round(sum(left) * part)) for part in parts] if shares else left
    rows = [one.ids[torch.arange(count) % rest] for one, count, rest in zip(read, taken, left, strict=True)]
    tails = [one.ids[rest:] for one, rest in zip(read, left, strict=True)]
    train, aside = TextRows(torch.cat(rows)), TextRows(torch.cat(tails))
    passes = max_tokens / (len(train) * seqlen) if max_tokens else None
    facts = {
        "seqlen": seqlen,
        "windows": len(train),
        "tokens": len(train) * seqlen,
        "held_out": len(aside),
        "passes": passes,
        "special_tokens": special_tokens(tokenizer) if tokenizer else "",
        "ids_sha256": train.sha256,
        "held_out_sha256": aside.sha256,
        "sources": [
            one.facts | {"held_out": one_apart, "windows_a_pass": count, "times_a_pass": count / rest}
            for one, one_apart, count, rest in zip(read, apart, taken, left, strict=True)
        ],
    }
    return TrainingData(train, aside, facts, tuple(_notes(passes, len(train) * seqlen, read, taken, left)))


@dataclass(frozen=True, eq=False)
class _Read:
    """The (n, seqlen) int32 windows of one source."""

    name: str
    ids: Tensor
    facts: dict[str, Any]


def _read(
    spec: Spec, tokenizer: PreTrainedTokenizerBase | None, seqlen: int, vocab_size: int | None, most: int
) -> _Read:
    name, source = describe_source(spec), open_source(spec)
    if isinstance(source, TokenIds):
        ids = source.read(vocab_size).int()
        if ids.shape[1] != seqlen:
            raise CalibrationError(f"{name}: holds windows of {ids.shape[1]} tokens, seqlen says {seqlen}")
        return _Read(name, ids, {"source": name, "windows": len(ids), "text_sha256": None})
    if tokenizer is None:
        raise CalibrationError(f"{name}: the model has no tokenizer; give windows of token ids as a .npy file")
    texts = [text for text in source.texts("calibration") if text.strip()]
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}\n{text}".encode())
    Random(_SHUFFLE).shuffle(texts)
    documents = list(_tokenized(texts, tokenizer, most))
    stream = pack(documents, tokenizer.eos_token_id)
    count = len(stream) // seqlen
    if not count:
        raise CalibrationError(
            f"{name}: comes to {len(stream)} tokens, one window needs {seqlen}; give more text or a smaller seqlen"
        )
    if vocab_size is not None and int(stream.max()) >= vocab_size:
        raise CalibrationError(
            f"{name}: the tokenizer gives token id {int(stream.max())}, the model has {vocab_size}; "
            "take the tokenizer that belongs to the model"
        )
    facts = {
        "source": name,
        "documents": len(texts),
        "documents_taken": len(documents),
        "tokens": len(stream),
        "windows": count,
        "text_sha256": digest.hexdigest(),
    }
    return _Read(name, stream[: count * seqlen].view(count, seqlen), facts)


def _tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int) -> Iterator[Tensor]:
    """Ids of one document after another, until they come to ``most``."""
    seen = 0
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        some = list(texts[start : start + _DOCUMENTS_AT_ONCE])
        # Not verbose: texts longer than the model's context are what we cut windows from, not a mistake.
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            yield torch.tensor(ids, dtype=torch.int32)
            seen += len(ids)
        if seen >= most:
            return


def _check(
    sources: Sequence[Spec], seqlen: int, shares: Sequence[float], held_out: float, max_seqlen: int | None
) -> None:
    if not sources:
        raise RecipeError("data: there is no source; give one as in --data wikitext2")
    if shares and len(shares) != len(sources):
        raise RecipeError(f"data: {len(shares)} shares for {len(sources)} sources; give one a source, or none")
    if any(not share > 0 for share in shares):
        raise RecipeError(f"data: shares are {', '.join(map(str, shares))}; each must be more than 0")
    if not 0 < held_out < 1:
        raise RecipeError(f"data: held_out is {held_out}; give a fraction between 0 and 1")
    if seqlen < 2 or (max_seqlen is not None and seqlen > max_seqlen):
        raise RecipeError(f"data: seqlen {seqlen} is not from 2 to the {max_seqlen} tokens that the model takes")


def _notes(
    passes: float | None, tokens: int, read: Sequence[_Read], taken: Sequence[int], left: Sequence[int]
) -> Iterator[str]:
    if passes is not None and passes > 1:
        yield f"data: {tokens} tokens are fewer than are to be trained on; {passes:.1f} passes are made over them"
    for one, count, rest in zip(read, taken, left, strict=True):
        documents, used = one.facts.get("documents", 0), one.facts.get("documents_taken", 0)
        if used < documents:
            yield f"data: {one.name}: {used} of its {documents} documents are taken, which come to enough tokens"
        if count > rest:
            yield f"data: {one.name}: its share is {count / rest:.1f} times its {rest} windows; they recur in each pass"
