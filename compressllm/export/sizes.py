"""How large the linears of a checkpoint are on disk."""

from __future__ import annotations

from typing import NamedTuple

from compressllm.core.packedcodes import ORDER, SCALES
from compressllm.core.protocols import FORMATS
from compressllm.core.registry import build
from compressllm.core.stockcodes import FORMAT, PARTS
from compressllm.models.checkpoint import Checkpoint


class Sizes(NamedTuple):
    """Bytes of the sparse linears' weights: in their own dtype with all zeros in place, and as they are stored."""

    dense: int
    stored: int

    @property
    def ratio(self) -> float:
        """Stored over dense; 1.0 if there are none."""
        return self.stored / self.dense if self.dense else 1.0


def exported_sizes(checkpoint: Checkpoint) -> Sizes:
    """How large a checkpoint's sparse linears are; at 2:4 packed in 16 bit, the ratio is 0.5625."""
    if checkpoint.facts is None:
        return Sizes(0, 0)
    name = checkpoint.facts.format
    parts = PARTS if name == FORMAT else (*build(FORMATS, name).tensors, SCALES, ORDER)
    plain, stored = checkpoint.specs, checkpoint.stored_specs
    linears = checkpoint.facts.linears
    return Sizes(
        sum(plain[f"{name}.weight"].bytes for name in linears),
        sum(stored[name].bytes for name in (f"{one}.{part}" for one in linears for part in parts) if name in stored),
    )
