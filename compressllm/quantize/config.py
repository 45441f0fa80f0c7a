"""Settings of the quantize stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressllm.calibration.config import CalibrationConfig
from compressllm.core.config import Config, Device, Dtype, method_of
from compressllm.core.protocols import QUANTIZERS
from compressllm.core.scheme import SchemeName


class QuantizeConfig(Config):
    """Round weights to fewer bits; the mask stays as it is."""

    scheme: SchemeName = "int8"
    """What weights are rounded to: int8, int4-g128, int4-g64, int4-g32 (weights that share a scale) or fp8; and with
    int8-dynamic and fp8-dynamic each token of the inputs, when the model runs."""
    method: method_of(QUANTIZERS) = "gptq"  # type: ignore[valid-type]
    """How they are rounded: a name from `compressllm list quantizers`, or {name: {option: value}}."""
    skip: tuple[str, ...] = ()
    """Globs of linears to leave as they are, as in '*.o_proj' or 'model.layers.0.*'."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text the method looks at, if it looks at any."""
    order: Literal["parallel", "sequential"] = "parallel"
    """Whether a block's linears are calibrated on its unquantised siblings, or in turn on those quantised before."""
    dtype: Dtype = "auto"
    """Dtype of the forward passes; scales and codes do not depend on it but through the calibration."""
    device: Device = "auto"
    """Where the forward passes run."""
    activation_memory_gb: float = Field(default=4.0, ge=0)
    """Hidden states held in memory; more spill to disk."""
