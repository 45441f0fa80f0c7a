"""A conversation as token ids, and which of them the model is to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

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


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Encoded | str:
    """Tokens of a conversation in the tokenizer's chat template, of which the assistant's turns are to be said.

    What is asked and what is answered are tokenised apart, as they are when the model answers: no token goes over the
    border. A tokenizer without a template gives turns with blank lines between, and EOS after each answer.

    Returns: or, in a few words, why the template cannot take it.
    """
    if tokenizer.chat_template is None:
        return _plain(messages, tokenizer)
    ids: list[int] = []
    said: list[bool] = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            asked, answered = (
                str(tokenizer.apply_chat_template(list(messages[:end]), tokenize=False, add_generation_prompt=prompt))
                for end, prompt in ((index, True), (index + 1, False))
            )
        except TemplateError as error:
            return f"that the chat template refuses ({' '.join(str(error).split())})"
        if not (asked.startswith(before) and answered.startswith(asked)):
            return "whose earlier turns the chat template rewrites"
        answer, end, rest = _until_last(answered[len(asked) :], str(tokenizer.eos_token))
        for text, is_said in ((asked[len(before) :], False), (answer + end, True), (rest, False)):
            some = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            ids += some
            said += [is_said] * len(some)
        before = answered
    return Encoded(ids, said)


def _until_last(text: str, eos: str) -> tuple[str, str, str]:
    """What stands before the last EOS, the EOS, and what a template puts after it, which is nobody's to say."""
    answer, end, rest = text.rpartition(eos)
    return (answer, end, rest) if end else (text, "", "")


def _plain(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids: list[int] = list(tokenizer("", verbose=False)["input_ids"])  # what every text starts with, BOS say
    while ids and ids[-1:] == eos:
        ids.pop()
    said = [False] * len(ids)
    for message in messages:
        answer = message["role"] == "assistant"
        text = message["content"] if answer else message["content"] + "\n\n"
        some = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + (eos if answer else [])
        ids += some
        said += [answer] * len(some)
    return Encoded(ids, said)
