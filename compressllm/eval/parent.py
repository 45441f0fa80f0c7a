"""How often a model and its dense parent say the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.run import Track, untracked

_PROMPTS: Final = 16
_PROMPT_TOKENS: Final = 64
_NEW_TOKENS: Final = 64


@dataclass(frozen=True)
class Answers:
    """What a model says to windows of text.

    Args:
        following: (windows, seqlen - 1) the likeliest token after each one but the last.
        written: (windows, new tokens) its greedy continuation of the beginning of each window.
    """

    following: Tensor
    written: Tensor


@torch.no_grad()
def answers(model: PreTrainedModel, windows: Tensor, progress: Track = untracked) -> Answers:
    """What the model says to the first 16 of (n, seqlen) windows: after each token, and going on from the first 64.

    An end of text is not taken, so that all continuations are 64 tokens long. The model is left in eval mode.
    """
    model.eval()
    device = model.get_input_embeddings().weight.device
    windows = windows[:_PROMPTS].to(device)
    prompt = windows[:, : min(_PROMPT_TOKENS, windows.shape[1])]
    following, written = [], []
    for at in progress(range(len(windows)), len(windows), "asking"):
        window = windows[at : at + 1]
        following.append(model(input_ids=window, use_cache=False).logits[0, :-1].argmax(-1).cpu())
        out = model.generate(
            prompt[at : at + 1],
            attention_mask=torch.ones_like(prompt[at : at + 1]),
            min_new_tokens=_NEW_TOKENS,
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        written.append(out[0, prompt.shape[1] :].cpu())
    return Answers(torch.stack(following), torch.stack(written))


def agreement(parent: Answers, model: Answers) -> dict[str, Any]:
    """How alike the answers of two models of the same vocabulary to the same windows are."""
    same = (parent.written == model.written).int()
    prefix = same.cumprod(1).sum(1).float()
    prompts, length = same.shape
    return {
        "next_token": float((parent.following == model.following).float().mean()),
        "next_tokens": parent.following.numel(),
        "same_prefix": float(prefix.mean()),
        "identical": int((prefix == length).sum()),
        "prompts": prompts,
        "new_tokens": length,
        "protocol": (
            f"next_token: share of {parent.following.numel()} tokens of text after which both find the same token "
            f"likeliest; same_prefix: of {length} tokens written greedily after each of {prompts} prompts, the mean "
            "number of the same ones before the first that is not"
        ),
    }
