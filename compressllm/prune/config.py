"""Settings of the prune stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressllm.calibration.config import CalibrationConfig
from compressllm.core.config import Config, Device, Dtype, Pattern, PatternOrDense, method_of
from compressllm.core.pattern import NM
from compressllm.core.protocols import ALLOCATORS, PRUNERS


class PruneConfig(Config):
    """Prune a checkpoint in one shot."""

    method: method_of(PRUNERS) = "wanda"  # type: ignore[valid-type]
    """How weights are chosen: a name from `compressllm list pruners`, or {name: {option: value}}."""
    pattern: Pattern = NM(2, 4)
    """What stays: N:M as in 2:4 (keep 2 of every 4), or the fraction removed as in 0.5, 0.5/row, 0.5/layer."""
    masks: str | None = None
    """A pruned checkpoint whose masks a refiner starts from, in place of its initial pruner's; their pattern stays."""
    allocation: method_of(ALLOCATORS) = "uniform"  # type: ignore[valid-type]
    """How a fraction is spread over the linears: a name from `compressllm list allocators`, or with its options."""
    patterns: dict[str, PatternOrDense] = Field(default_factory=dict)
    """Patterns of single linears by glob, the first that matches: {'*.down_proj': '4:8', 'model.layers.0.*': dense}."""
    skip: tuple[str, ...] = ()
    """Globs of linears to leave dense, as in '*.o_proj' or 'model.layers.0.*'."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text the method looks at, if it looks at any."""
    order: Literal["parallel", "sequential"] = "parallel"
    """Whether a block's linears are calibrated on its dense siblings, or in turn on those pruned before them."""
    dtype: Dtype = "auto"
    """Dtype of the forward passes; what is stored keeps its own. A model already in memory keeps its dtype."""
    device: Device = "auto"
    """Where the forward passes run. A model already in memory stays where it is."""
    activation_memory_gb: float = Field(default=4.0, ge=0)
    """Hidden states held in memory; more spill to disk."""
