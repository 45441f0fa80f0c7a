"""Settings of the export stage."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from compressllm.core.config import Config
from compressllm.core.errors import CompressError
from compressllm.core.protocols import FORMATS


def _known(name: str) -> str:
    try:
        FORMATS.get(name)
    except CompressError as error:
        raise ValueError(str(error)) from None
    return name


class ExportConfig(Config):
    """Write a checkpoint in the form it is shipped in."""

    format: Annotated[str, AfterValidator(_known)] = "packed"
    """A name from `compressllm list formats`."""
