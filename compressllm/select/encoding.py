"""Records to token ids, the response's apart from the prompt's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from compressllm.models.chattemplate import apply_template
from compressllm.select.records import Record

# What is too long is cut here, so the tokenizer need not say that it is.
_QUIET: Final[dict[str, Any]] = {"verbose": False}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record.

    Args:
        ids: Prompt and response.
        start: Where the response begins, at least 1: what stands before it predicts its first token.
        whole: Whether all of the record is in it.
    """

    ids: tuple[int, ...]
    start: int
    whole: bool


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, limit: int) -> Encoded:
    """Token ids of a record, by the tokenizer's chat template if it has one, or else prompt, line end, response.

    Past ``limit`` tokens the response keeps its beginning, at least half of the limit if it is that long, and the
    prompt its end, which is where the question mostly stands.
    """
    if tokenizer.chat_template:
        turns = [{"role": role, "content": text} for role, text in record.turns]
        text = apply_template(tokenizer, turns, answer_next=True)
        prompt = _ids(tokenizer(text, add_special_tokens=False, **_QUIET))
    else:
        prompt = _ids(tokenizer(record.prompt + "\n", **_QUIET))
    response = _ids(tokenizer(record.response, add_special_tokens=False, **_QUIET))
    if tokenizer.eos_token_id is not None:
        response.append(tokenizer.eos_token_id)
    whole = len(prompt) + len(response) <= limit
    if not whole:
        response = response[: max(limit // 2, limit - len(prompt))]
        prompt = prompt[-(limit - len(response)) :]
    return Encoded((*prompt, *response), len(prompt), whole)


def _ids(made: Any) -> list[int]:
    return list(made["input_ids"] if isinstance(made, Mapping) else made)
