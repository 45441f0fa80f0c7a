"""How far apart two models' predictions of responses are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.select.encoding import Encoded

# Rows of float32 probabilities that exist at once, in numbers: 64 MB each.
_NUMBERS: Final = 1 << 24


def response_divergence(dense: PreTrainedModel, pruned: PreTrainedModel, batch: Sequence[Encoded]) -> Tensor:
    """(b, 2) float32 on the CPU: mean over a record's response tokens of the Jensen-Shannon divergence between the
    models' next-token distributions, in [0, ln 2], and of KL(dense || pruned); in nats.

    Both models have the same vocabulary and are on one device.
    """
    ids = torch.zeros(len(batch), max(len(one.ids) for one in batch), dtype=torch.int64)
    for row, one in enumerate(batch):  # padded behind, where a causal model does not look
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(batch):
        wanted[row, one.start - 1 : len(one.ids) - 1] = True  # the positions that predict the response
    columns = wanted.any(dim=0).nonzero().squeeze(1)
    wanted = wanted[:, columns]
    device = dense.device
    ids, columns, at = ids.to(device), columns.to(device), wanted.to(device)
    with torch.inference_mode():
        p, q = (_logits(model, ids, columns)[at] for model in (dense, pruned))  # (tokens, vocabulary)
        size = max(1, _NUMBERS // p.shape[1])
        chunks = (slice(start, start + size) for start in range(0, len(p), size))
        tokens = torch.cat([_both(p[chunk], q[chunk]) for chunk in chunks]).cpu()
        rows = wanted.nonzero()[:, 0]
        sums = torch.zeros(len(batch), 2).index_add_(0, rows, tokens)
        return sums / wanted.sum(dim=1, keepdim=True)


def _logits(model: PreTrainedModel, ids: Tensor, columns: Tensor) -> Tensor:
    """(b, columns, vocabulary): the model's own, so that whatever it does to them is in them."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits  # type: ignore[no-any-return]
    return model(input_ids=ids, use_cache=False).logits[:, columns]  # type: ignore[no-any-return]


def _both(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """(tokens, 2) float32: JSD and KL(p || q) of each row of two (tokens, vocabulary) logits.

    Source: Lin, Divergence measures based on the Shannon entropy, 1991: half of KL to the mean from each side.
    """
    # Some models give tokens that do not exist a logit of minus infinity; 0 times a number is 0.
    log_p, log_q = (logits.float().log_softmax(dim=-1).clamp_min_(-1e4) for logits in (p_logits, q_logits))
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q)).sum(dim=-1)
    log_mean = (p + q).mul_(0.5).clamp_min_(torch.finfo(torch.float32).tiny).log_()
    jsd = 0.5 * (p.mul_(log_p.sub_(log_mean)) + q.mul_(log_q.sub_(log_mean))).sum(dim=-1)
    return torch.stack([jsd.clamp_(0, math.log(2)), kl.clamp_min_(0)], dim=-1)
