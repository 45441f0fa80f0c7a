"""ScaleLoRA: kept weights are multiplied by a low-rank matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import ADAPTERS
from compressllm.recover.adapters.linearwise import LinearAdapter
from compressllm.recover.adapters.starts import kaiming


@ADAPTERS.register("scalelora")
@dataclass(frozen=True)
class ScaleLoRA(LinearAdapter):
    """Train a low-rank matrix that multiplies the kept weights, and norms and biases: W * (B A).

    A is (r, in), B is (out, r). The paper begins with all entries 1 / sqrt(r): B A is 1, but all ranks are then given
    the same gradients and stay one. Here the first row of A and the first column of B are 1, the other rows of A random
    and the other columns of B zero, which is 1 as well and lets the ranks part.

    Args:
        rank: r.

    Source: Zimmer et al., PERP, 2023.
    """

    rank: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"adapter scalelora: got rank {self.rank}; at least 1 is needed")

    def start(self, shape: tuple[int, int], random: torch.Generator) -> dict[str, Tensor]:
        """B A = 1."""
        out, columns = shape
        scale_a, scale_b = kaiming((self.rank, columns), random), torch.zeros(out, self.rank)
        scale_a[0], scale_b[:, 0] = 1.0, 1.0
        return {"scale_a": scale_a, "scale_b": scale_b}

    def effective(self, weight: Tensor, keep: Tensor, *small: Tensor) -> Tensor:
        """W * (B A)."""
        scale_a, scale_b = small
        return weight * (scale_b @ scale_a)
