"""How a quantised weight lies on disk: the codes of kept weights, and the scales, beside the bitmask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.errors import FormatError
from compressllm.core.masks import kept_shape, pack_bits, put_kept, take_kept
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.scheme import Scheme

#: Last part of the name of the tensor that only quantised linears have.
SCALES = "scales"

#: Last part of the name of the tensor that linears have whose groups lie in an order of inputs of their own.
ORDER = "order"

#: Dtype of the stored values -> bits of a code; two codes of 4 bits are in one byte.
CODE_DTYPES = {torch.int8: 8, torch.float8_e4m3fn: 8, torch.uint8: 4}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def codes_layout(name: str, dtype: torch.dtype, keep: Tensor, scheme: Scheme, ordered: bool = False) -> Layout:
    """Tensor name -> dtype and shape of what `pack_codes` yields for a linear under this (out, in) mask.

    Args:
        dtype: Of the weight that was quantised.
        ordered: Whether its groups lie in an order of inputs of their own.
    """
    out, columns = keep.shape
    return {
        f"{name}.values": (torch.uint8 if scheme.bits == 4 else scheme.dtype, _stored_shape(keep, scheme.bits)),
        f"{name}.{SCALES}": (torch.float16, (out, -(-columns // scheme.width(columns)))),
        f"{name}.bitmask": (torch.uint8, (out, -(-columns // 8))),
        f"{name}.weight": (dtype, (0,)),
        **({f"{name}.{ORDER}": (torch.int32, (columns,))} if ordered else {}),
    }


def pack_codes(name: str, weight: QuantizedWeight, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the packed format, with codes for values and scales beside them.

    ``{name}.values`` holds the codes of kept weights in row-major order: int8 or float8_e4m3fn as packed values are,
    codes of 4 bits in pairs, the first of a pair in the low half of a uint8; a row, or what is stored in one piece,
    of an odd number ends with 0. ``{name}.scales`` is float16 (out, groups). The empty ``{name}.weight`` has the dtype
    of the weight that was quantised. Where groups are not of inputs as they come, ``{name}.order``, int32 (in,), says
    of which.
    """
    values = take_kept(weight.codes, keep).view(kept_shape(keep))
    yield f"{name}.values", _pair(values) if weight.bits == 4 else values
    yield f"{name}.{SCALES}", weight.scales.half()
    yield f"{name}.bitmask", pack_bits(keep)
    yield f"{name}.weight", torch.empty(0, dtype=weight.computes_in)
    if weight.order is not None:
        yield f"{name}.{ORDER}", weight.order.int()


def unpack_codes(
    name: str,
    read: Callable[[str], Tensor],
    keep: Tensor,
    dtype: torch.dtype,
    dynamic: bool = False,
    ordered: bool = False,
) -> QuantizedWeight:
    """The weight that `pack_codes` was given, bit for bit, meant for activations of ``dtype``.

    Args:
        dynamic: Whether these are rounded as well, which the tensors do not say.
        ordered: Whether there is a tensor of the order that groups lie in.

    Raises: FormatError if values, scales, mask and order do not agree.
    """
    values, scales = read(f"{name}.values"), read(f"{name}.{SCALES}")
    (out, columns), bits = keep.shape, CODE_DTYPES.get(values.dtype)
    if bits is None or tuple(values.shape) != _stored_shape(keep, bits):
        raise FormatError(
            f"{name}: values are {values.dtype} {tuple(values.shape)}, which are not codes of what its bitmask keeps; "
            "quantise the model again"
        )
    groups = {-(-columns // group): group for group in (32, 64, 128, columns) if group <= columns}
    if scales.dtype != torch.float16 or scales.dim() != 2 or len(scales) != out or scales.shape[1] not in groups:
        raise FormatError(
            f"{name}: scales are {scales.dtype} {tuple(scales.shape)}, a weight of {out} x {columns} needs float16, "
            f"({out}, {' or '.join(map(str, groups))}); quantise the model again"
        )
    codes = _unpair(values, kept_shape(keep)) if bits == 4 else values
    order = _checked(name, read(f"{name}.{ORDER}"), columns) if ordered else None
    group = groups[scales.shape[1]]
    return QuantizedWeight(put_kept(codes, keep), scales.float(), bits, group, dtype, dynamic, order)


def _checked(name: str, order: Tensor, columns: int) -> Tensor:
    if order.dtype != torch.int32 or not torch.equal(order.sort().values, torch.arange(columns, dtype=torch.int32)):
        raise FormatError(f"{name}: its order does not name each of {columns} inputs once; quantise the model again")
    return order.long()


def _stored_shape(keep: Tensor, bits: int) -> tuple[int, ...]:
    *rows, length = kept_shape(keep)
    return (*rows, -(-length * bits // 8))


def _pair(codes: Tensor) -> Tensor:
    """(..., n) int8 in -8..7 -> (..., ceil(n / 2)) uint8."""
    half = functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8) & 15
    return half[..., 0::2] | (half[..., 1::2] << 4)


def _unpair(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_pair`, for codes of ``shape``."""
    half = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)[..., : shape[-1]]
    return ((half ^ 8).view(torch.int8) - 8).contiguous()  # the sign is the highest of four bits
