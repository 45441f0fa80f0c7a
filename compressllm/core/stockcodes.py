"""How a quantised weight lies in a checkpoint of compressed-tensors: every code is stored, zeros in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.errors import FormatError
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.scheme import Scheme

#: What ``compressllm.json`` and `compressllm export` call it, and config.json as ``quant_method``.
FORMAT = "compressed-tensors"

#: Last parts of the names of tensors that stand for a quantised weight.
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape")

_WORD = 32  # bits of the integers that codes are packed into

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def stock_format(scheme: Scheme) -> str:
    """The library's name of the layout.

    Integer weights are packed where activations are not rounded: loaders take the plain layout for a sign that they
    are.
    """
    if scheme.float8:
        return "float-quantized"
    return "int-quantized" if scheme.dynamic else "pack-quantized"


def stock_refuses(scheme: Scheme, columns: int) -> str | None:
    """Why a weight of so many inputs cannot be stored so, or None."""
    if scheme.group and columns % scheme.group:
        fit = [f"int{scheme.bits}-g{group}" for group in (64, 32) if not columns % group]
        advice = f"quantise to {fit[0]}" if fit else "name it under skip"
        return f"{columns} inputs are no multiple of {scheme.group}, which {FORMAT} needs; {advice}"
    return None


def stock_layout(name: str, dtype: torch.dtype, shape: tuple[int, int], scheme: Scheme) -> Layout:
    """Tensor name -> dtype and shape of what `pack_stock` yields for a weight of ``shape`` (out, in).

    Args:
        dtype: Of the weight that was quantised; scales have it.
    """
    out, columns = shape
    scales: Layout = {f"{name}.weight_scale": (dtype, (out, -(-columns // scheme.width(columns))))}
    if stock_format(scheme) != "pack-quantized":
        return {f"{name}.weight": (scheme.dtype, shape), **scales}
    words = -(-columns * scheme.bits // _WORD)
    return {
        f"{name}.weight_packed": (torch.int32, (out, words)),
        **scales,
        f"{name}.weight_shape": (torch.int64, (2,)),
    }


def pack_stock(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weight: codes as they are, or packed into int32 as `_pack` does; scales in its dtype.

    Raises: FormatError if that dtype does not hold the scales.
    """
    if weight.order is not None:
        raise FormatError(
            f"{name}: its groups lie in an order of inputs of its own, and none is written as {FORMAT}; quantise to a "
            "scale a row, as int8, or prune without gather"
        )
    scales = weight.scales.to(weight.computes_in)
    if not torch.equal(scales.float(), weight.scales):
        raise FormatError(f"{name}: {weight.computes_in} does not hold its scales; quantise the model again")
    if stock_format(weight.scheme) != "pack-quantized":
        zero = weight.codes.float() == 0  # float8 has a -0.0 as well
        yield f"{name}.weight", weight.codes.view(torch.int8).masked_fill(zero, 0).view(weight.codes.dtype)
        yield f"{name}.weight_scale", scales
        return
    yield f"{name}.weight_packed", _pack(weight.codes, weight.bits)
    yield f"{name}.weight_scale", scales
    yield f"{name}.weight_shape", torch.tensor(weight.shape)


def unpack_stock(name: str, read: Callable[[str], Tensor], shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
    """The weight that `pack_stock` was given. Raises FormatError if the tensors do not fit the scheme."""
    scales = read(f"{name}.weight_scale")
    layout = stock_layout(name, scales.dtype, shape, scheme)
    tensors = {part: scales if part.endswith("_scale") else read(part) for part in layout}
    for part, (dtype, size) in layout.items():
        if tensors[part].dtype != dtype or tuple(tensors[part].shape) != size:
            raise FormatError(
                f"{part}: is {tensors[part].dtype} {tuple(tensors[part].shape)}, {scheme} needs {dtype} {size}; "
                "export the model again"
            )
    packed = tensors.get(f"{name}.weight_packed")
    codes = tensors[f"{name}.weight"] if packed is None else _unpack(packed, shape[1], scheme.bits)
    return QuantizedWeight(codes, scales.float(), scheme.bits, scheme.width(shape[1]), scales.dtype, scheme.dynamic)


def stock_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: every nn.Linear but those of ``ignore`` is quantised.

    There is no ``sparsity_config``: what reads one has been taken out of the loaders, and newer ones refuse it.
    """
    number = {"num_bits": scheme.bits, "type": "float" if scheme.float8 else "int", "symmetric": True}
    shared: dict[str, Any] = {"strategy": "group", "group_size": scheme.group} if scheme.group else {}
    weights = {**number, "strategy": "channel", "dynamic": False, "observer": "minmax", **shared}
    inputs = {**number, "num_bits": 8, "strategy": "token", "dynamic": True} if scheme.dynamic else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": FORMAT,
        "format": stock_format(scheme),
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(out, in) int8 -> (out, words) int32: codes plus 2^(bits - 1), the first in the lowest bits of a word."""
    each = _WORD // bits
    raised = functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % each))
    shifts = torch.arange(each) * bits
    words = (raised.view(len(codes), -1, each) << shifts).sum(-1)  # below 2^32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _unpack(words: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    shifts = torch.arange(_WORD // bits) * bits
    raised = (words.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (raised.flatten(1)[:, :columns] - (1 << (bits - 1))).to(torch.int8).contiguous()
