"""How far apart two results are."""

from __future__ import annotations

from torch import Tensor


def relative_difference(one: Tensor, other: Tensor) -> float:
    """``max |one - other| / max |other|``; 0 for equal tensors, NaN or infinite if a value is not finite."""
    apart = float((one - other).abs().max())
    return apart / float(other.abs().max()) if apart else apart
