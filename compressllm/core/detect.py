"""Find the pattern of a weight that comes without a mask, or of a mask that comes without a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from compressllm.core.pattern import NM, SparsityPattern, Unstructured

#: The N:M patterns looked for: what keeps least first, and among equals what has the smaller groups.
KNOWN_PATTERNS = (NM(1, 4), NM(2, 8), NM(4, 16), NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32), NM(3, 4))

#: A weight counts as sparse without a pattern only if packing saves a tenth. Rounding alone leaves some zeros.
_WORTHWHILE = 0.9


def find_sparsity(weight: Tensor) -> tuple[SparsityPattern, Tensor] | None:
    """The pattern of an (out, in) weight and its bool mask, read off its zeros; None if it is dense.

    A group of an N:M pattern with fewer than N non-zeros keeps its first zeros as well, so that every group keeps N.
    """
    nonzero = weight != 0
    density = int(nonzero.count_nonzero()) / max(1, nonzero.numel())
    if density + 1 / (8 * weight.dtype.itemsize) > _WORTHWHILE:
        return None
    pattern = pattern_of(nonzero)
    return pattern, _topped_up(nonzero, pattern) if isinstance(pattern, NM) else nonzero


def pattern_of(keep: Tensor) -> SparsityPattern:
    """The tightest pattern an (out, in) bool mask obeys, out of `KNOWN_PATTERNS`; else its sparsity."""
    kept = int(keep.count_nonzero())
    for pattern in KNOWN_PATTERNS:
        fits = kept * pattern.m <= keep.numel() * pattern.n and pattern.refuses(keep.shape) is None
        if fits and not pattern.violations(keep):
            return pattern
    counts = keep.sum(1, dtype=torch.int32)
    even = bool((counts == counts[0]).all())
    removed = keep.numel() - kept
    # Rounded down to the six digits a pattern is written with, so that the mask removes no less than it says.
    return Unstructured(removed * 10**6 // keep.numel() / 10**6, "row" if even else "layer")


def _topped_up(nonzero: Tensor, pattern: NM) -> Tensor:
    groups = nonzero.view(nonzero.shape[0], -1, pattern.m)
    missing = pattern.n - groups.sum(-1, keepdim=True)
    zeros = (~groups).cumsum(-1, dtype=torch.int8)  # 1 at a group's first zero, 2 at its second
    return (groups | (~groups & (zeros <= missing))).view(nonzero.shape)
