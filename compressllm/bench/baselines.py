"""What torch offers for a dense linear: the competitors that sparse kernels are held against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Formats of a weight, the most exact first.
FORMATS = ("fp32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Baseline:
    """A dense linear.

    Args:
        name: Of torch's function.
        format: What it holds the weight in, one of `FORMATS`.
        pack: (out, in) bfloat16 weight -> its operands.
        linear: (tokens, in) bfloat16 and the operands -> (tokens, out).
    """

    name: str
    format: str
    pack: Callable[[Tensor], Any]
    linear: Callable[[Tensor, Any], Tensor]


def baselines(device: torch.device, group: int) -> list[Baseline]:
    """Those that run on ``device``; the weights of the quantised ones are never looked at, only read.

    Args:
        group: Inputs that share a scale, in int4.
    """
    found = [
        Baseline("linear float32", "fp32", Tensor.float, lambda x, weight: functional.linear(x.float(), weight)),
        Baseline("linear bfloat16", "bf16", Tensor.clone, functional.linear),
    ]
    if device.type == "cpu":
        found += [
            Baseline("_weight_int8pack_mm", "int8", _int8, lambda x, packed: torch._weight_int8pack_mm(x, *packed)),
            Baseline("_weight_int4pack_mm_for_cpu", "int4", functools.partial(_int4, group=group), _int4_linear),
        ]
    return [one for one in found if _runs(one, device)]


def at_least_as_exact(format: str) -> tuple[str, ...]:
    """The formats that keep as much of a weight as ``format``, or more."""
    return FORMATS[: FORMATS.index(format) + 1]


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1) / 127
    return (weight / scales.unsqueeze(1)).round().to(torch.int8), scales


def _int4(weight: Tensor, group: int) -> tuple[Tensor, int, Tensor]:
    out, columns = weight.shape
    codes = torch.randint(0, 16, (out, columns), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    return packed, group, torch.full((columns // group, out, 2), 0.01, dtype=weight.dtype)


def _int4_linear(x: Tensor, packed: tuple[Tensor, int, Tensor]) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, *packed)


def _runs(baseline: Baseline, device: torch.device) -> bool:
    weight = torch.ones(128, 128, dtype=torch.bfloat16, device=device)
    try:
        baseline.linear(weight[:1], baseline.pack(weight))
    except (RuntimeError, AttributeError, NotImplementedError):  # this build of torch lacks it
        return False
    return True
