"""AdaptedLinear: a masked linear that stays as it is while a few parameters beside it are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

#: ``effective(weight, keep, *small)``: the (out, in) weight that is computed with, of the frozen (out, in) weight, its
#: mask and the trained parameters, all but the mask of one dtype. Differentiable in the trained ones; zero where the
#: mask prunes.
Effective = Callable[..., Tensor]


class AdaptedLinear(nn.Module):
    """Stands for an nn.Linear or a Conv1D: ``y = x E^T + b`` with E = effective(W, keep, small parameters).

    Weight and bias go by the names they had, so that the model's tensors are found as before. Neither forward nor
    backward keeps E, which is as large as W: it is computed again.

    Args:
        linear: What it stands for. Its parameters are used, not copied.
        keep: (out, in) bool. A buffer that is not saved: masks are stored on their own.
        effective: What the small parameters do to the weight.
        small: Name -> initial value of the parameters that are trained, in the order ``effective`` takes them.
    """

    keep: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear | Conv1D, keep: Tensor, effective: Effective, small: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, linear.weight)
        self.register_parameter("bias", linear.bias)
        self.register_buffer("keep", keep.to(linear.weight.device), persistent=False)
        self.transposed = isinstance(linear, Conv1D)
        self._effective, self._small = effective, tuple(small)
        for name, value in small.items():
            self.register_parameter(name, nn.Parameter(value.to(linear.weight)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Recomputed.apply(x, self._turned(self.weight), self.bias, self._weight, *self._parameters_trained())  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def merged(self) -> nn.Linear | Conv1D:
        """The plain linear with E for a weight, computed in float32 or wider; +0.0 wherever the mask prunes.

        The weight is changed in place and shared with the result.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        small = (parameter.to(wide) for parameter in self._parameters_trained())
        weight = self._effective(self._turned(self.weight).to(wide), self.keep, *small)
        # Filled, not left to the product with the mask, which gives -0.0 as well.
        self._turned(self.weight.data).copy_(weight.masked_fill_(~self.keep, 0.0))
        out, columns = self.keep.shape
        with torch.device("meta"):
            plain = Conv1D(out, columns) if self.transposed else nn.Linear(columns, out, bias=False)
        plain.weight = self.weight
        plain.register_parameter("bias", self.bias)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        out, columns = self.keep.shape
        return f"in_features={columns}, out_features={out}, trained={', '.join(self._small)}"

    def _weight(self, weight: Tensor, *small: Tensor) -> Tensor:
        return self._effective(weight, self.keep, *small)

    def _parameters_trained(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in self._small]

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight


class _Recomputed(torch.autograd.Function):
    """``x E^T + b``; the gradients of what E is made of come from autograd over a second computation of E."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, effective: Effective, *small: Tensor
    ) -> Tensor:
        ctx.effective = effective
        ctx.save_for_backward(x, weight, *small)
        with torch.autocast(x.device.type, enabled=False):  # E is to be the same in both directions
            used = effective(weight, *small).to(x.dtype)
            return functional.linear(x, used, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *small = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in small]
                used = ctx.effective(weight, *leaves).to(x.dtype)
            rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
            grads = torch.autograd.grad(used, leaves, rows.T @ x.reshape(-1, x.shape[-1]))
            grad_x = grad @ used.detach() if ctx.needs_input_grad[0] else None
            grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, *grads
