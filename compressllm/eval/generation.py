"""Generate text and time it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressllm.eval.decoding import Decoder, Native
from compressllm.models.prompting import encode_prompt


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Args:
        text: What was added to the prompt, special tokens left out.
        tokens: Number of tokens added.
        tokens_per_second: Over the whole call, prompt included.
    """

    text: str
    tokens: int
    tokens_per_second: float


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    seed: int = 0,
    chat: bool = False,
    fast: bool = False,
    native: Native | None = None,
) -> Generated:
    """Continue ``prompt``, greedily unless a temperature is given.

    Args:
        chat: Wrap the prompt in the tokenizer's chat template as a user's message.
        fast: Decode with a static cache, by a native step if there is one, else by one that is compiled first, which
            takes a minute or so: for long texts. Of the model's generation config only its end tokens count then.
        native: As `Decoder` takes it.

    Raises: FormatError if there is no tokenizer, or no chat template that takes the prompt; RecipeError for a
        prompt without tokens.
    """
    ids = encode_prompt(tokenizer, prompt, chat).to(model.device)
    assert tokenizer is not None  # or there would be no ids
    torch.manual_seed(seed)
    if fast:
        new, seconds = _decode(model, ids, max_new_tokens, temperature, native)
    else:
        new, seconds = _generate(model, tokenizer, ids, max_new_tokens, temperature)
    return Generated(tokenizer.decode(new, skip_special_tokens=True), len(new), len(new) / seconds)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float | None,
) -> tuple[Tensor, float]:
    """The new ids, and seconds."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    begun = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    return out[0, ids.shape[1] :], time.perf_counter() - begun


def _decode(
    model: PreTrainedModel, ids: Tensor, max_new_tokens: int, temperature: float | None, native: Native | None
) -> tuple[Tensor, float]:
    """The same by a native or a compiled step; compiling is not counted in the seconds."""
    ends = model.generation_config.eos_token_id
    stop = set(ends) if isinstance(ends, list) else {ends}
    decoder = Decoder(model, ids.shape[1] + max_new_tokens, compiled=True, native=native)
    decoder.prefill(ids)
    decoder.step(ids[:, -1:])  # compiles
    begun = time.perf_counter()
    logits, new = decoder.prefill(ids), []
    while True:
        if temperature:
            following = torch.multinomial((logits.float() / temperature).softmax(-1), 1)
        else:
            following = logits.argmax(-1, keepdim=True)
        new.append(int(following))
        if len(new) == max_new_tokens or new[-1] in stop:
            return torch.tensor(new), time.perf_counter() - begun
        logits = decoder.step(following)
