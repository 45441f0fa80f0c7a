"""Settings of the export stage."""

from __future__ import annotations

from compressllm.core.config import Config, name_in
from compressllm.core.protocols import FORMATS
from compressllm.core.stockcodes import FORMAT


class ExportConfig(Config):
    """Write a checkpoint in the form it is shipped in."""

    format: name_in(FORMATS, FORMAT) = "packed"  # type: ignore[valid-type]
    """A name from `compressllm list formats`; or compressed-tensors, of a quantised model, as that library loads it."""
