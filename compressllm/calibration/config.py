"""Settings of calibration text."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from compressllm.core.config import Config


class CalibrationConfig(Config):
    """Which text a method is calibrated on, and how much of it."""

    source: str | dict[str, dict[str, Any] | None] = "builtin"
    """A name from `compressllm list sources`, a text file, or a .npy file of token ids."""
    samples: int | None = Field(default=None, ge=1)
    """Number of windows; 128 unless the source is a file of token ids."""
    seqlen: int | None = Field(default=None, ge=2)
    """Tokens in a window; the smaller of 2048 and what the model allows, unless the source is token ids."""
