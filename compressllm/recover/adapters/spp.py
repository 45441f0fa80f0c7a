"""SPP: kept weights are scaled by a low-rank pattern of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import ADAPTERS
from compressllm.recover.adapters.linearwise import LinearAdapter
from compressllm.recover.adapters.starts import kaiming


@ADAPTERS.register("spp")
@dataclass(frozen=True)
class SPP(LinearAdapter):
    """Train a factor of every kept weight, and norms and biases: W * (1 + alpha / r * rows(P) * q).

    P is (r, in) and random, each of its rows repeated for out / r rows of the weight; q is (out, 1) and zero at first.

    Args:
        rank: r, a divisor of every out. The released code fixes it at 16 here and takes another in the factor.
        alpha: How far the factor counts.

    Source: Lu et al., SPP, ICML 2024.
    """

    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"adapter spp: got rank {self.rank}; at least 1 is needed")

    def start(self, shape: tuple[int, int], random: torch.Generator) -> dict[str, Tensor]:
        """P random, q zero. Raises RecipeError unless the rank divides out."""
        out, columns = shape
        if out % self.rank:
            raise RecipeError(f"{out} outputs are not a multiple of rank {self.rank}, as adapter spp needs")
        return {"spp_p": kaiming((self.rank, columns), random), "spp_q": torch.zeros(out, 1)}

    def effective(self, weight: Tensor, keep: Tensor, *small: Tensor) -> Tensor:
        """W * (1 + alpha / r * rows(P) * q); the rows are repeated by broadcasting."""
        p, q = small
        grouped = weight.reshape(self.rank, -1, weight.shape[1])  # (r, out / r, in)
        factor = q.view(self.rank, -1, 1) * p.unsqueeze(1)
        return torch.addcmul(grouped, grouped, factor, value=self.alpha / self.rank).view(weight.shape)
