"""A linear that reads its weight once for the few tokens of a check."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressllm.contextual.control import Control, Mode
from compressllm.kernels.few import few_tokens

_TAKEN = (torch.float32, torch.bfloat16)


class CheckedLinear:
    """Stands in for the forward of an nn.Linear: the same, sooner where a check has a few tokens on a CPU."""

    def __init__(self, linear: nn.Linear, control: Control) -> None:
        self._linear, self._control = linear, control

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._control.mode is Mode.CHECK:
            return few_tokens(x, self._linear.weight, self._linear.bias)
        return functional.linear(x, self._linear.weight, self._linear.bias)


def takes(linear: nn.Module) -> bool:
    """Whether a check of it can be sooner."""
    return type(linear) is nn.Linear and linear.weight.dtype in _TAKEN and linear.weight.device.type == "cpu"
