"""Initial values of what adapters train."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiming(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    """(r, in) float32 on the CPU, uniform within 1 / sqrt(in), as LoRA begins."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=random)
