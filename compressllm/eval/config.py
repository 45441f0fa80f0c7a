"""Settings of the eval stage."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from compressllm.core.config import Config, Device, Dtype, name_in
from compressllm.core.protocols import BACKENDS


class EvalConfig(Config):
    """Measure perplexity."""

    source: str | dict[str, dict[str, Any] | None] = "builtin"
    """A name from `compressllm list sources`, a text file, or a .npy file of token ids."""
    seqlen: int | None = Field(default=None, ge=2)
    """Tokens in a window; the smaller of 1024 and what the model allows, unless the source is token ids."""
    windows: int | None = Field(default=None, ge=1)
    """At most this many windows, from the start of the text; all of it unless given."""
    dtype: Dtype = "auto"
    """Dtype the model computes in; the loss is always float32."""
    device: Device = "auto"
    """Where the model runs."""
    backend: name_in(BACKENDS, "auto") = "auto"  # type: ignore[valid-type]
    """Kernel backend of sparse linears, from `compressllm list backends`, or auto for the fastest."""
    keep_dense: bool = False
    """Let auto keep a dense copy of a linear beside its packed form, for prompts, where that is faster."""
