"""QuantizedWeight: integer codes of a linear's weight and the scales that give them their size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressllm.core.errors import FormatError

#: Bits of a code -> the largest magnitude a symmetric quantiser uses.
LARGEST = {8: 127, 4: 7}


@dataclass(frozen=True)
class QuantizedWeight:
    """An (out, in) weight as small integers: W = codes * scales, symmetric, zero is code 0.

    Args:
        codes: (out, in) int8; with 4 bits in -8..7. A pruned weight is 0.
        scales: (out, ceil(in / group)) float32, one for every ``group`` consecutive inputs of a row.
        bits: 8 or 4.
        group: 32, 64 or 128; or, one scale a row, the number of inputs.
        computes_in: Dtype of the activations it is meant for, and the one `dequantize` gives unless told.

    Raises: FormatError if these do not fit each other.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    computes_in: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.bits not in LARGEST:
            raise FormatError(f"a quantised weight has {self.bits} bits; 8 and 4 are supported")
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2:
            raise FormatError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)}; they must be int8, (out, in)")
        out, columns = self.codes.shape
        if self.group not in {32, 64, 128, columns}:
            raise FormatError(f"a group of {self.group} columns; supported are 32, 64, 128 and all {columns} of a row")
        needed = (out, -(-columns // self.group))
        if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != needed:
            raise FormatError(
                f"scales are {self.scales.dtype} {tuple(self.scales.shape)}; a weight of {out} x {columns} in groups "
                f"of {self.group} needs float32 {needed}"
            )

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.computes_in

    def to(self, target: torch.device | torch.dtype) -> QuantizedWeight:
        """The same weight on another device, or meant for activations of another dtype."""
        if isinstance(target, torch.dtype):
            return replace(self, computes_in=target)
        return replace(self, codes=self.codes.to(target), scales=self.scales.to(target))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) weight. In float32 the product is exact for scales that float16 holds, and is rounded once."""
        return dequantize(self.codes, self.scales, self.group).to(dtype or self.computes_in)


def dequantize(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """(out, in) int8 codes and (out, ceil(in / group)) scales -> (out, in) float32."""
    return codes * scales.repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def quantize_absmax(weight: Tensor, keep: Tensor, bits: int, group: int) -> QuantizedWeight:
    """Round to nearest, each group of a row scaled so that its largest weight gets the largest code.

    Scales are float16 numbers, held in float32, and chosen before rounding: kernels keep them in two bytes without
    loss. A group too small for float16 to scale is scaled by its smallest number, 2^-24.

    Args:
        weight: (out, in), any float dtype, finite.
        keep: (out, in) bool; what it prunes gets code 0.
        bits: 8 or 4.
        group: 32, 64, 128, or the number of inputs.

    Raises: FormatError if bits or group are not supported, or a scale is too large for float16.
    """
    if bits not in LARGEST:
        raise FormatError(f"quantisation to {bits} bits; 8 and 4 are supported")
    out, columns = weight.shape
    kept = weight.float().masked_fill(~keep, 0.0)
    padded = torch.nn.functional.pad(kept, (0, -columns % group)).view(out, -1, group)
    scales = (padded.abs().amax(-1) / LARGEST[bits]).half().float()
    if not scales.isfinite().all():
        raise FormatError(f"weights as large as {kept.abs().max():g} or not finite; {bits}-bit scales are float16")
    scales = scales.clamp(min=2.0**-24)  # an all-zero group too: dividing by its scale must give 0
    codes = (padded / scales.unsqueeze(-1)).round_().clamp_(-LARGEST[bits], LARGEST[bits])
    codes = codes.view(out, -1)[:, :columns].to(torch.int8).contiguous()
    return QuantizedWeight(codes, scales, bits, group, weight.dtype)
