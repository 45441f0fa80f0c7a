"""Which device and dtype to compute with."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressllm.core.errors import BackendUnavailableError

if TYPE_CHECKING:
    from compressllm.core.config import Device, Dtype


def choose_device(wanted: Device) -> torch.device:
    """The device asked for; ``auto`` takes a CUDA device if there is one.

    Raises: BackendUnavailableError if CUDA is asked for and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("device cuda: this machine or this build of torch has none; use --device cpu")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def choose_dtype(wanted: Dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype asked for; ``auto`` takes the stored one, or float32 where a CPU has no arithmetic for it."""
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    if device.type == "cpu" and (stored == torch.float16 or (stored == torch.bfloat16 and not _cpu_has_bf16())):
        return torch.float32
    return stored


def training_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """The dtype asked for; ``auto`` takes bfloat16 where its matrix products are much faster, else float32."""
    if wanted == "auto":
        return torch.bfloat16 if multiplies_bf16_faster(device) else torch.float32
    return getattr(torch, wanted)  # type: ignore[no-any-return]


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def multiplies_bf16_faster(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are much faster than in float32: on CUDA, and on CPUs with units for them."""
    return device.type == "cuda" or has_tiles() or _cpu_says("_is_avx512_bf16_supported")


def has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 on AMX's tiles."""
    return _cpu_says("_is_amx_tile_supported")


def _cpu_says(question: str) -> bool:
    return bool(getattr(torch.cpu, question, lambda: False)())  # not in every torch


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
