"""Conversations as text, by the template that comes with a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from compressllm.core.errors import FormatError


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, answer_next: bool
) -> str:
    """A conversation as its tokenizer's template writes it.

    Templates are programs that come with a checkpoint. transformers runs them in Jinja's sandbox, where they reach
    nothing but what they are given; what they raise there may be any error.

    Args:
        answer_next: Whether the text ends where the model is to answer.

    Raises: FormatError with what the template raised.
    """
    try:
        made = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer_next
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"the chat template refuses the conversation: {reason}") from None
    return str(made)
