"""The accelerator of this process, and what launches cannot be trained under."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from compressllm.core.errors import RecipeError
from compressllm.core.ranks import Ranks


def accelerator_for(device: torch.device, ranks: Ranks) -> Accelerator:
    """The accelerator of a process of this launch.

    Raises: RecipeError for a launch that shards parameters in a way that masks do not survive.
    """
    refuse_flat_parameters()
    known = PartialState._shared_state
    if known and (known.get("num_processes") != ranks.size or known["device"].type != device.type):
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training of this process had another
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def refuse_flat_parameters() -> None:
    """Raise RecipeError if `accelerate launch` was told to flatten parameters.

    FSDP1 and ZeRO-3 give a process slices of flattened parameters, which start and end within rows: a mask, which is
    of two dimensions, cannot follow them, and a weight that has lost its mask trains as a dense one, silently.
    """
    if _flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError("FSDP1 flattens parameters away from their masks; launch without it and use --sharding fsdp2")
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        why = "ZeRO-3 flattens parameters away from their masks" if stage == "3" else "DeepSpeed is not supported"
        raise RecipeError(f"{why}; launch without it and use --sharding fsdp2")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}
