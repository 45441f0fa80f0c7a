"""Settings of a soup."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compressllm.core.config import Config, Device, Dtype, name_in
from compressllm.core.protocols import FORMATS


class SoupConfig(Config):
    """How models are averaged into one."""

    method: Literal["uniform", "greedy"] = "uniform"
    """uniform takes all; greedy the best, and of the others those that do not hurt on held-out text."""
    source: str | dict[str, dict[str, Any] | None] | None = None
    """Held-out text for greedy: a file, a .npy file of token ids, or the calibration part of a named source."""
    windows: int | None = Field(default=None, ge=1)
    """Windows of it to measure on; 128 unless the source is a file of token ids."""
    seqlen: int | None = Field(default=None, ge=2)
    """Tokens in a window; the smaller of 2048 and what the model allows, unless the source is token ids."""
    dtype: Dtype = "auto"
    """Dtype the models are measured in."""
    device: Device = "auto"
    """Where they are measured."""
    format: name_in(FORMATS) = "dense"  # type: ignore[valid-type]
    """How the soup lies on disk."""
