"""Generate text and time it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressllm.core.errors import FormatError, RecipeError


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
) -> Generated:
    """Continue ``prompt``, greedily unless a temperature is given.

    Args:
        chat: Wrap the prompt in the tokenizer's chat template as a user's message.

    Raises: FormatError if there is no tokenizer or no chat template; RecipeError for a prompt without tokens.
    """
    if tokenizer is None:
        raise FormatError("the model folder holds no tokenizer, so no text can be generated")
    if chat:
        if not tokenizer.chat_template:
            raise FormatError("the tokenizer has no chat template; leave --chat out")
        message = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids.to(model.device)
    if not ids.numel():
        raise RecipeError("the prompt holds no token; give some text")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    begun = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - begun
    new = out[0, ids.shape[1] :]
    return Generated(tokenizer.decode(new, skip_special_tokens=True), len(new), len(new) / seconds)
