"""The output head of a causal LM as what it computes, so that a loss can go over it in chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.compute import multiplies_bf16_faster
from compressllm.core.errors import UnsupportedModelError

#: Settings in which models say that they multiply their logits, or divide them, by a constant.
_MULTIPLIES, _DIVIDES = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
_SOFTCAP: Final = "final_logit_softcapping"
_TRIED_TOKENS: Final = 8


@dataclass(frozen=True, eq=False)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), the plain product by default.

    Args:
        weight: (V, d).
        bias: (V,) or None.
        scale: What the product is multiplied by.
        softcap: Bound of the logits, or None where there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V: the number of logits of one token."""
        return self.weight.shape[0]

    def prepared(self, dtype: torch.dtype) -> Head:
        """The same head without a graph, its weight in ``dtype``: converted once, not for every chunk."""
        return replace(
            self, weight=self.weight.detach().to(dtype), bias=None if self.bias is None else self.bias.detach()
        )

    def logits_(self, hidden: Tensor, out: Tensor, temperature: float = 1.0) -> Tensor:
        """Write the logits of (n, d) hidden states over a temperature into ``out``, (n, V) float32 or float64.

        Args:
            hidden: In the weight's dtype and on its device, which may be another than ``out``'s.
        """
        if self.weight.device != out.device:
            there = torch.empty(out.shape, dtype=out.dtype, device=self.weight.device)
            return out.copy_(self.logits_(hidden, there, temperature))
        product(hidden, self.weight.t(), out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap:
            return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        return out if self.scale == temperature else out.mul_(self.scale / temperature)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model whose weights are in memory, compared with the model's own logits on a few tokens.

    Raises: UnsupportedModelError if its logits are made in some other way.
    """
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    weight = getattr(module, "weight", None)
    if weight is None:
        raise UnsupportedModelError(f"{type(model).__name__}: has no output head with a weight; losses at it need one")
    scale = 1.0
    for name in _MULTIPLIES:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVIDES:
        scale /= getattr(config, name, None) or 1.0
    head = Head(weight, getattr(module, "bias", None), scale, getattr(config, _SOFTCAP, None))
    _check(model, head)
    return head


def hidden_states(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """(B, S, d) what the head of ``model`` is given, from the entries of ``batch`` that its forward takes."""
    inputs = {key: value for key, value in batch.items() if key != "labels" and value is not None}
    hidden: Tensor = model.base_model(**inputs, use_cache=False)[0]
    return hidden


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write the matrix product of ``a`` and ``b`` into ``out``, which is in their dtype, or in float32 on CUDA."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    return out


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply tensors of ``dtype`` in so that products come out in float32 at least.

    Half precision stays where the device rounds no product to it: on CUDA, from torch 2.8 on.
    """
    if dtype.itemsize >= 4 or (device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")):
        return dtype
    return torch.float32


def rounds_products(*tensors: Tensor) -> bool:
    """Whether `bf16_products` of these changes anything."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)  # not in every torch
    rounded = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    return setting is not None and rounded and multiplies_bf16_faster(tensors[0].device)


@contextmanager
def bf16_products(*tensors: Tensor) -> Iterator[None]:
    """Have a CPU's float32 products take their inputs as bfloat16, if all of ``tensors`` are that.

    CPUs with units for bfloat16 multiply so several times faster, and sum in float32 all the same: logits lose nothing,
    and of gradients the factors are rounded as they are in every other layer. The setting is the process's: no other
    thread may multiply meanwhile.
    """
    if not rounds_products(*tensors):
        yield
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@torch.no_grad()
def _check(model: PreTrainedModel, head: Head) -> None:
    """Raise unless ``head`` gives the logits that ``model`` does."""
    device = head.weight.device
    ids = torch.arange(min(_TRIED_TOKENS, head.vocab_size), device=device).unsqueeze(0)
    own = model(input_ids=ids, use_cache=False).logits[0]
    hidden = hidden_states(model, {"input_ids": ids})[0]
    dtype = product_dtype(hidden.dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    if hidden.shape[-1] != head.weight.shape[1] or own.shape[-1] != head.vocab_size:
        raise _unlike(model, f"takes {head.weight.shape[1]} inputs where hidden states have {hidden.shape[-1]}")
    ours = head.prepared(dtype).logits_(hidden.to(dtype), torch.empty(own.shape, dtype=wide, device=device))
    error = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-6))
    if not error <= max(1e-3, 8 * torch.finfo(own.dtype).eps):
        raise _unlike(model, f"gives other logits than its weight does, by {error:.0%}")


def _unlike(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: its output head {reason}; recovery knows heads with bias, scale and softcap only"
    )
