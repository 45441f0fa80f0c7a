"""MaskLoRA: a low-rank update under the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import ADAPTERS
from compressllm.recover.adapters.linearwise import LinearAdapter
from compressllm.recover.adapters.starts import kaiming


@ADAPTERS.register("masklora")
@dataclass(frozen=True)
class MaskLoRA(LinearAdapter):
    """Train a low-rank update of the kept weights, and norms and biases: W + alpha / r * keep * (B A).

    A is (r, in) and random, B is (out, r) and zero at first. The paper also puts an ordinary LoRA beside the head,
    which is dense; here the head stays as it is.

    Args:
        rank: r.
        alpha: How far the update counts.

    Source: Zimmer et al., PERP, 2023; Munoz et al., SQFT, 2024.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"adapter masklora: got rank {self.rank}; at least 1 is needed")

    def start(self, shape: tuple[int, int], random: torch.Generator) -> dict[str, Tensor]:
        """A random, B zero."""
        out, columns = shape
        return {"lora_a": kaiming((self.rank, columns), random), "lora_b": torch.zeros(out, self.rank)}

    def effective(self, weight: Tensor, keep: Tensor, *small: Tensor) -> Tensor:
        """(W + alpha / r * B A) * keep, which is the same as W is zero elsewhere, in fewer passes."""
        lora_a, lora_b = small
        return torch.addmm(weight, lora_b, lora_a, alpha=self.alpha / self.rank).mul_(keep)
