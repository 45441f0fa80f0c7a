"""A teacher's most likely next tokens out of its hidden states, chunk by chunk."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from compressllm.recover.head import Head, bf16_products, product_dtype
from compressllm.recover.headchunks import TeacherTopK

_CHUNK: Final = 512  # tokens at a time
_LEAST_TAIL: Final = -30.0  # log of a mass that nothing can be learnt from; float16 holds no log of zero


@torch.inference_mode()
def top_k(hidden: Tensor, head: Head, k: int) -> TeacherTopK:
    """The ``k`` most likely next tokens at each of T positions, at temperature 1, and what all others come to.

    Args:
        hidden: (T, d), as the head takes them.
        head: On the same device.

    Returns: (T, k) int64 ids, the likeliest first; float32 logs.
    """
    with bf16_products(hidden, head.weight):
        return _top_k(hidden, head.prepared(product_dtype(hidden.dtype, hidden.device)), k)


def _top_k(hidden: Tensor, head: Head, k: int) -> TeacherTopK:
    dtype = head.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    k = min(k, head.vocab_size - 1)  # the bucket of the others holds one token at least
    buffer = torch.empty((min(_CHUNK, len(hidden)), head.vocab_size), dtype=wide, device=hidden.device)
    parts = []
    for states in torch.split(hidden, _CHUNK):
        logits = head.logits_(states.to(dtype), buffer[: len(states)])
        top, ids = logits.topk(k, dim=-1)
        rest = logits.scatter_(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        total = torch.cat([top, rest], 1).logsumexp(-1, keepdim=True)
        parts.append((ids, (top - total).float(), (rest - total).squeeze(1).clamp_min(_LEAST_TAIL).float()))
    ids, logprobs, tail = (torch.cat(part) for part in zip(*parts, strict=True))
    return TeacherTopK(ids, logprobs, tail)
