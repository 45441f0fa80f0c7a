"""Settings of the contextual stage."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from compressllm.calibration.config import CalibrationConfig
from compressllm.core.config import Config, Device, Dtype, method_of, name_in
from compressllm.core.protocols import BACKENDS, CORRECTORS, NEURON_SELECTORS


class ContextualConfig(Config):
    """Choose neurons by prompt or by token, and measure what that costs and what correction brings back."""

    selector: method_of(NEURON_SELECTORS) = "griffin"  # type: ignore[valid-type]
    """How neurons are chosen: a name from `compressllm list neuron-selectors`, or {name: {option: value}}."""
    density: float = Field(default=0.5, gt=0, le=1)
    """Fraction of neurons kept; of teal the fraction of the blocks' weights read."""
    curve: tuple[float, ...] = ()
    """More densities to measure, for a curve."""
    correct: method_of(CORRECTORS) | None = "sirius"  # type: ignore[valid-type]
    """How drafts are corrected: a name from `compressllm list correctors`, {name: {option: value}}, or null."""
    skip_first: int = Field(default=0, ge=0)
    """Blocks at the front that stay dense."""
    skip_last: int = Field(default=0, ge=0)
    """Blocks at the end that stay dense."""
    calibration: CalibrationConfig = CalibrationConfig(samples=32, seqlen=256)
    """Text the selector looks at, if it looks at any."""
    source: str | dict[str, dict[str, Any] | None] = "builtin"
    """Text to measure on: a name from `compressllm list sources`, a text file, or a .npy file of token ids."""
    windows: int = Field(default=8, ge=1)
    """Windows of it; each is scored, and begins a generation."""
    seqlen: int = Field(default=256, ge=4)
    """Tokens in a window."""
    prompt_tokens: int = Field(default=64, ge=1)
    """Tokens of a window that are the prompt; dense, and what neurons are chosen by."""
    new_tokens: int = Field(default=48, ge=2)
    """Tokens to generate after each prompt."""
    probes: int = Field(default=8, ge=0)
    """Questions of each small task with a right answer (sums, copying, look-ups); 0 asks none."""
    dtype: Dtype = "auto"
    """Dtype the model computes in."""
    device: Device = "auto"
    """Where the model runs."""
    backend: name_in(BACKENDS, "auto") = "auto"  # type: ignore[valid-type]
    """Kernel backend of sparse linears, from `compressllm list backends`, or auto for the fastest."""
