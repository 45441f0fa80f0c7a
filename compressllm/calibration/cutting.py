"""Cut texts into token windows of one length: the papers' protocols for calibration and for perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressllm.core.errors import CalibrationError

_TRIED_PER_SAMPLE: Final = 200  # of C4's documents about one in 35 is longer than 2048 tokens
_TRIED_AT_LEAST: Final = 10_000


def stream_windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seqlen: int, source: str) -> Tensor:
    """Cut all texts end to end: (floor(tokens / seqlen), seqlen) int64.

    The texts are joined by two newlines and tokenised once with the tokenizer's default special tokens, so
    that at most one BOS stands at the very beginning; the remainder is dropped.

    Raises: CalibrationError if there is not a single window.

    Source: the perplexity evaluation of GPTQ, SparseGPT and Wanda.
    """
    ids = tokenize(tokenizer, "\n\n".join(texts))
    count = len(ids) // seqlen
    if not count:
        raise _too_short(source, len(ids), seqlen)
    return ids[: count * seqlen].long().view(count, seqlen)


def calibration_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int, seed: int, source: str
) -> tuple[Tensor, Literal["crops", "packed"], str | None]:
    """One random crop of each of ``samples`` random documents: (samples, seqlen) int64, how, and a note.

    Only documents with more than ``seqlen`` tokens count, their default special tokens included. As in the
    reference, except that no document is used twice and that the search ends: where there are too few long
    documents all are packed instead, as `packed_windows` says, and the note tells so. Documents are tokenised
    only as they are tried.

    Raises: CalibrationError if all documents together are shorter than one window.

    Source: the calibration data of SparseGPT and Wanda.
    """
    random = Random(seed)
    most = max(_TRIED_AT_LEAST, _TRIED_PER_SAMPLE * samples)
    documents = draw_documents((text for text in texts if text.strip()), most, random)
    tried: dict[int, Tensor] = {}
    crops: list[Tensor] = []
    for index in random.sample(range(len(documents)), len(documents)):
        ids = tried[index] = tokenize(tokenizer, documents[index])
        if len(ids) > seqlen:
            start = random.randrange(len(ids) - seqlen)  # the last offset is left out, as in the reference
            crops.append(ids[start : start + seqlen])
        if len(crops) == samples:
            return torch.stack(crops).long(), "crops", None

    stream = pack([tried[index] for index in range(len(documents))], tokenizer.eos_token_id)
    if len(stream) < seqlen:
        raise _too_short(source, len(stream), seqlen)
    note = (
        f"{source}: {len(crops)} of {len(documents)} documents are longer than {seqlen} tokens, "
        f"{samples} are needed; took windows of all of them packed"
    )
    if len(stream) // seqlen < samples:
        note += f", overlapping, as {len(stream)} tokens are fewer than {samples} x {seqlen}"
    return packed_windows(stream, samples, seqlen, random), "packed", note


def draw_documents(texts: Iterable[str], most: int, random: Random) -> list[str]:
    """All texts in their order or, where there are more than ``most``, that many drawn evenly in one pass.

    Source: Vitter 1985, algorithm R.
    """
    drawn: list[str] = []
    for seen, text in enumerate(texts, 1):
        if len(drawn) < most:
            drawn.append(text)
        elif (place := random.randrange(seen)) < most:
            drawn[place] = text
    return drawn


def pack(documents: Sequence[Tensor], eos: int | None) -> Tensor:
    """One (tokens,) int32 stream of all documents, ``eos`` between them unless it is None or stands there already."""
    parts: list[Tensor] = [torch.empty(0, dtype=torch.int32)]
    for document in documents:
        if eos is not None and len(parts[-1]) and parts[-1][-1] != eos:
            parts.append(torch.tensor([eos], dtype=torch.int32))
        parts.append(document)
    return torch.cat(parts)


def packed_windows(stream: Tensor, samples: int, seqlen: int, random: Random) -> Tensor:
    """(samples, seqlen) int64 windows of a stream of at least ``seqlen`` tokens, in random order.

    Windows that do not overlap where there are enough, else at random offsets.
    """
    whole = len(stream) // seqlen
    if whole >= samples:
        starts = [index * seqlen for index in random.sample(range(whole), samples)]
    else:
        starts = [random.randrange(len(stream) - seqlen + 1) for _ in range(samples)]
    return torch.stack([stream[start : start + seqlen] for start in starts]).long()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """(tokens,) int32 ids of a text of any length, with the tokenizer's default special tokens."""
    # Not verbose: texts longer than the model's context are what we cut windows from, not a mistake.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int32)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens that the tokenizer adds to a text by default, for example ``<s>``, or an empty string."""
    added = tokenizer("", verbose=False)["input_ids"]
    return " ".join(str(tokenizer.convert_ids_to_tokens(id)) for id in added if id in tokenizer.all_special_ids)


def _too_short(source: str, tokens: int, seqlen: int) -> CalibrationError:
    return CalibrationError(
        f"{source}: comes to {tokens} tokens, one window needs {seqlen}; give more text or a smaller seqlen"
    )
