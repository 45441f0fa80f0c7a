"""A linear that leaves out the small ones among its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressllm.contextual.control import Control
from compressllm.contextual.mlp import Part
from compressllm.contextual.runner import Runner
from compressllm.kernels.active import active_columns
from compressllm.kernels.linear import SparseLinear

_FEW_TOKENS = 8


class InputLinear(Runner):
    """``W x`` of the inputs larger in magnitude than a threshold, whose columns alone are read.

    Holds a transposed copy of the weight. A packed weight is computed as a whole, of masked inputs.

    Args:
        linear: An nn.Linear or a SparseLinear.
        threshold: Inputs up to this magnitude are left out.
        planned: Fraction of the inputs that it should leave in.
    """

    def __init__(self, linear: nn.Module, threshold: float, planned: float, control: Control) -> None:
        part = Part(linear)
        super().__init__(part, control, int(linear.out_features) * int(linear.in_features))  # type: ignore[arg-type]
        self._part, self.threshold, self._planned = part, threshold, planned
        self.packed = isinstance(linear, SparseLinear)
        self._weight_t = None if self.packed else part.weight.detach().t().contiguous()

    def draft(self, x: Tensor) -> Tensor:
        """Of large inputs."""
        keep = x.abs() > self.threshold
        shape = x.shape
        rows = x.numel() // shape[-1]
        if self._weight_t is None or rows > _FEW_TOKENS:
            self.count(1.0)
            return self._part(x * keep)
        x, keep = x.reshape(rows, -1), keep.view(rows, -1)
        index = (keep[0] if rows == 1 else keep.any(0)).nonzero().view(-1).int()
        used = x.index_select(1, index)
        if rows > 1:
            used = used * keep.index_select(1, index)
        self.count(len(index) / shape[-1])
        y = active_columns(used, self._weight_t, index)
        if self._part.bias is not None:
            y = y + self._part.bias
        return y.view(*shape[:-1], -1)

    def planned(self) -> float:
        """The share of inputs that calibration found above the threshold."""
        return 1.0 if self.packed else self._planned


def linears_in(block: nn.Module, name: str) -> dict[str, nn.Module]:
    """Name -> linear of a block, in definition order."""
    return {f"{name}.{path}": one for path, one in block.named_modules() if isinstance(one, nn.Linear | SparseLinear)}


def quantile(sorted_values: Tensor, fraction: float) -> float:
    """The value that ``fraction`` of a table of evenly spaced quantiles lies at or below, between entries linear."""
    place = fraction * (len(sorted_values) - 1)
    low = min(int(place), len(sorted_values) - 2)
    return float(torch.lerp(sorted_values[low], sorted_values[low + 1], place - low))
