"""A mixture's experts in checkpoints: one tensor of each, which transformers puts into one parameter of all."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from compressllm.models.linears import PrunableLinear

#: Parameter of all experts -> what its rows are, in order, by the names `linears_of` gives them.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def expert_weight(stored: str, loaded: str, source: str, converter: WeightConverter) -> str | None:
    """The weight name of an expert's linear, or None if the converter does anything but lay experts side by side.

    Args:
        stored: Name in the checkpoint, for example ``model.layers.0.block_sparse_moe.experts.3.w1.weight``.
        loaded: Name of the parameter it becomes a part of, ``model.layers.0.mlp.experts.gate_up_proj``.
        source: The converter's pattern that the tensor's name matched.
    """
    owner, _, held = loaded.rpartition(".")
    parts = _PARTS.get(held, ())
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    expected = [(MergeModulelist, 0), (Concatenate, 1)] if len(parts) == 2 else [(MergeModulelist, 0)]
    number = re.search(r"\.experts\.(\d+)\.", stored)
    if len(parts) != len(converter.source_patterns) or steps != expected or number is None:
        return None
    return f"{owner}.{number[1]}.{parts[converter.source_patterns.index(source)]}.weight"


def place_expert_(
    linear: PrunableLinear, weight: Tensor, dtype: torch.dtype | None, device: str | torch.device
) -> Tensor:
    """Copy one expert's (out, in) weight into the parameter that holds all experts; the place it has there, a view.

    The parameter is made, uninitialised, if it is on the meta device. Changes the linear's module in place.
    """
    held = linear.module._parameters[linear.leaf]
    if held is not None and held.is_meta:
        made = torch.empty(held.shape, dtype=dtype or weight.dtype, device=device)
        linear.module._parameters[linear.leaf] = nn.Parameter(made, requires_grad=False)
    place = linear.weight
    place.copy_(weight)
    return place
