"""A conversation as token ids, and which of them the model is to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from compressllm.core.errors import FormatError
from compressllm.models.chattemplate import apply_template
from compressllm.recover.records import Message


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether the model is to predict it."""

    ids: list[int]
    said: list[bool]

    def labels(self) -> list[int]:
        """For each position the token after it, -100 where that is not one the model is to say."""
        following = zip(self.ids[1:], self.said[1:], strict=True)
        return [id if said else -100 for id, said in following] + [-100]

    def cut(self, length: int) -> Encoded:
        """The first tokens."""
        return Encoded(self.ids[:length], self.said[:length])


#: A piece of text, and whether the model is to say it.
Piece = tuple[str, bool]


def encode_all(conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase) -> list[Encoded | str]:
    """Tokens of conversations in the tokenizer's chat template, of which the assistant's turns are to be said.

    What is asked and what is answered are tokenised apart, as they are when the model answers: no token goes over the
    border. A tokenizer without a template gives turns with blank lines between, and EOS after each answer.

    Returns: for each its tokens or, in a few words, why the template cannot take it.
    """
    plain = tokenizer.chat_template is None
    pieces = [_plain(turns, tokenizer) if plain else _templated(turns, tokenizer) for turns in conversations]
    texts = [text for one in pieces if not isinstance(one, str) for text, _ in one]
    # All at once: a fast tokenizer takes a list on all cores. Not verbose: what is too long is counted later.
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    start = _start(tokenizer) if plain else []
    encoded: list[Encoded | str] = []
    for one in pieces:
        if isinstance(one, str):
            encoded.append(one)
            continue
        parts = [(start, False), *((next(ids), said) for _, said in one)]
        encoded.append(Encoded([id for part, _ in parts for id in part], [said for part, said in parts for _ in part]))
    return encoded


def _templated(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece] | str:
    pieces: list[Piece] = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            asked, answered = (
                apply_template(tokenizer, messages[:end], answer_next=prompt)
                for end, prompt in ((index, True), (index + 1, False))
            )
        except FormatError as error:
            return f"that the chat template refuses ({str(error).partition(': ')[2]})"
        if not (asked.startswith(before) and answered.startswith(asked)):
            return "whose earlier turns the chat template rewrites"
        # What a template puts after the last EOS is nobody's to say.
        answer, end, rest = answered[len(asked) :].rpartition(str(tokenizer.eos_token))
        said, unsaid = (answer + end, rest) if end else (rest, "")
        pieces += [(asked[len(before) :], False), (said, True), (unsaid, False)]
        before = answered
    return pieces


def _plain(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    end = str(tokenizer.eos_token or "")
    return [
        (message["content"] + end, True) if message["role"] == "assistant" else (message["content"] + "\n\n", False)
        for message in messages
    ]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text, BOS say."""
    ids: list[int] = list(tokenizer("", verbose=False)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids.pop()
    return ids
