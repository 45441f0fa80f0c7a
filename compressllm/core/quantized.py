"""QuantizedWeight: codes of a linear's weight and the scales that give them their size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressllm.core.errors import FormatError
from compressllm.core.scheme import LARGEST, Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """An (out, in) weight as small numbers: W = codes * scales, symmetric, zero is code 0.

    Backends compute with integer codes; `integer` says whether these are.

    Args:
        codes: (out, in) int8, or with 8 bits float8_e4m3fn; with 4 bits in -8..7. A pruned weight is 0.
        scales: (out, ceil(in / group)) float32, one for every ``group`` consecutive inputs of a row.
        bits: 8 or 4.
        group: 32, 64 or 128; or, one scale a row, the number of inputs.
        computes_in: Dtype of the activations it is meant for, and the one `dequantize` gives unless told.
        dynamic: Whether activations are rounded as well, as `Scheme.round_tokens` does.
        order: (in,) int64 order of inputs whose consecutive ones share scales, codes lying as inputs came; None if
            that is how they came.

    Raises: FormatError if these do not fit each other.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    computes_in: torch.dtype = torch.bfloat16
    dynamic: bool = False
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in LARGEST:
            raise FormatError(f"a quantised weight has {self.bits} bits; 8 and 4 are supported")
        float8 = self.codes.dtype == torch.float8_e4m3fn and self.bits == 8
        if (self.codes.dtype != torch.int8 and not float8) or self.codes.dim() != 2:
            raise FormatError(
                f"codes are {self.codes.dtype} {tuple(self.codes.shape)}; they must be int8, or with 8 bits "
                "float8_e4m3fn, and (out, in)"
            )
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
    def scheme(self) -> Scheme:
        """What it was rounded to."""
        return Scheme(self.bits, None if self.group == self.shape[1] else self.group, not self.integer, self.dynamic)

    @property
    def integer(self) -> bool:
        """Whether the codes are integers."""
        return self.codes.dtype == torch.int8

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
        order = None if self.order is None else self.order.to(target)
        return replace(self, codes=self.codes.to(target), scales=self.scales.to(target), order=order)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) weight. In float32 the product is exact for scales that float16 holds, and is rounded once."""
        weight = self if self.order is None else self.in_order(self.order)
        made = dequantize(weight.codes, weight.scales, self.group).to(dtype or self.computes_in)
        return made if self.order is None else made.index_select(1, self.order.argsort())

    def in_order(self, order: Tensor) -> QuantizedWeight:
        """Its columns in its own order, or any if rows have one scale each: consecutive ones share scales then."""
        return replace(self, codes=self.codes.index_select(1, order), order=None)

    def placed(self, order: Tensor) -> QuantizedWeight:
        """Of a weight whose columns stood in an order when it was rounded: as they came. Inverse of `in_order`."""
        codes = self.codes.index_select(1, order.argsort())
        return replace(self, codes=codes, order=order if self.group < self.shape[1] else None)


@dataclass(frozen=True)
class StoredCodes:
    """A quantised weight left on disk.

    Args:
        scheme: What it was rounded to.
        read: Gives the weight, read anew at every call.
    """

    scheme: Scheme
    read: Callable[[], QuantizedWeight]


def dequantize(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """(out, in) codes and (out, ceil(in / group)) scales -> (out, in) float32."""
    codes = codes.float() if codes.is_floating_point() else codes  # torch multiplies no float8
    return codes * scales.repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def round_to_nearest(
    weight: Tensor, keep: Tensor, scheme: Scheme, group: int | None = None, order: Tensor | None = None
) -> QuantizedWeight:
    """Round each weight to the nearest of its group, whose scale is that of its largest kept weight.

    Scales are chosen before rounding; kernels keep them in two bytes without loss.

    Args:
        weight: (out, in), any float dtype, finite.
        keep: (out, in) bool; what it prunes gets code 0.
        group: Inputs that share a scale, if not as the scheme says.
        order: (in,) int64 order in which consecutive inputs share scales, if not as they come.

    Raises: FormatError if the group is not supported, or a scale is too large for float16.
    """
    if order is not None and (group or scheme.width(weight.shape[1])) < weight.shape[1]:
        return round_to_nearest(weight[:, order], keep[:, order], scheme, group).placed(order)
    out, columns = weight.shape
    group = group or scheme.width(columns)
    kept = weight.float().masked_fill(~keep, 0.0)
    padded = torch.nn.functional.pad(kept, (0, -columns % group)).view(out, -1, group)
    scales = scheme.scale(padded)
    codes = scheme.code(padded, scales.unsqueeze(-1)).view(out, -1)[:, :columns].to(scheme.dtype).contiguous()
    return QuantizedWeight(codes, scales, scheme.bits, group, weight.dtype, scheme.dynamic)


def quantize_absmax(
    weight: Tensor, keep: Tensor, bits: int, group: int, order: Tensor | None = None
) -> QuantizedWeight:
    """`round_to_nearest` to integers of 8 or 4 bits, a scale for 32, 64, 128 or all inputs. Raises FormatError."""
    return round_to_nearest(weight, keep, Scheme(bits, group), group, order)
