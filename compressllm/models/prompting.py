"""From a prompt's text to its token ids."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressllm.core.errors import FormatError, RecipeError
from compressllm.models.chattemplate import apply_template


def encode_prompt(tokenizer: PreTrainedTokenizerBase | None, prompt: str, chat: bool = False) -> Tensor:
    """(1, tokens) ids.

    Args:
        chat: Wrap the prompt in the tokenizer's chat template as a user's message.

    Raises: FormatError if there is no tokenizer, or no chat template that takes the prompt; RecipeError for a prompt
        without tokens.
    """
    if tokenizer is None:
        raise FormatError("the model folder holds no tokenizer, so no text can be generated")
    if chat:
        if not tokenizer.chat_template:
            raise FormatError("the tokenizer has no chat template; leave --chat out")
        prompt = apply_template(tokenizer, [{"role": "user", "content": prompt}], answer_next=True)
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
    if not ids.numel():
        raise RecipeError("the prompt holds no token; give some text")
    return ids
