"""Top-k: every token's strongest neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compressllm.core.protocols import NEURON_SELECTORS, BlockPass


@NEURON_SELECTORS.register("topk")
@dataclass(frozen=True)
class TopK:
    """A set a token: its strongest neurons, always as many; needs no calibration.

    Of equal ones the first are kept. For ReLU MLPs a density above the share of nonzero activations loses nothing.

    Args:
        by: ``product``, the input of down, for which up has to be computed too; or ``gate``, the gate's activation.

    Source: Li et al., The Lazy Neuron Phenomenon, arXiv 2210.06313 (product); Zhou et al., Sirius, arXiv 2409.03856,
    whose fine-grained sparsity takes the gate's top k in place of CATS's threshold.
    """

    by: Literal["product", "gate"] = "product"
    level: ClassVar[Literal["prompt", "token", "input"]] = "token"
    calibrated: ClassVar[bool] = False

    @property
    def gated(self) -> bool:
        """By the gate."""
        return self.by == "gate"

    def fit(self, blocks: Callable[[], Iterator[BlockPass]]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def keep(self, values: Tensor, density: float, mlp: str, fitted: Mapping[str, Tensor]) -> Tensor:
        """The largest in magnitude."""
        count = max(1, round(density * values.shape[-1]))
        order = values.abs().sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)
