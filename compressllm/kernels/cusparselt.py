"""cuSPARSELt: 2:4 on sparse tensor cores, through torch's operators for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.masks import raw
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight
from compressllm.kernels.gpu.choices import Choices, bucket
from compressllm.kernels.gpu.layout import fits_2to4

_LIBRARY = torch.library.Library("compressllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "cusparselt_2to4(Tensor x, Tensor compressed, Tensor? bias) -> Tensor"
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]

#: Dtype of the weight -> the integers it is held as. They tell the dtypes apart, and casting a module leaves them be.
_HELD_AS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.uint16,
    torch.int8: torch.int8,
    torch.float8_e4m3fn: torch.uint8,
}
_DTYPE_OF = {held: dtype for dtype, held in _HELD_AS.items()}
_RESULT = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}  # of 16-bit weights it is their own dtype
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_AT_ONCE = 1024  # columns unpacked at a time
_DEFAULT = (0, 1, -1)  # the library's own algorithm, columns not split
_first_device: list[torch.device] = []


@BACKENDS.register("cusparselt")
@dataclass(frozen=True)
class CuSparseLt:
    """2:4 and sparser on sparse tensor cores: 16 bit; fp8 and int8 with one scale a row, activations rounded too."""

    rank: ClassVar[int] = -1  # without a measurement dense goes first
    rounds_up_to: ClassVar[float] = math.inf

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse other patterns, shapes and dtypes, and machines without the library or a GPU it is proven on."""
        if not fits_2to4(pattern):
            return f"computes weights of at most 2 in every 4 inputs; this one is {pattern}"
        if isinstance(weight, QuantizedWeight) and (weight.bits != 8 or weight.group != weight.shape[1]):
            return (
                f"computes int8 with one scale a row; this is int{weight.bits} with a scale for {weight.group} inputs"
            )
        dtype = _stored(weight)
        if dtype not in _HELD_AS or (dtype == torch.int8 and not isinstance(weight, QuantizedWeight)):
            return f"computes bfloat16, float16, float8_e4m3fn and quantised int8 weights, not {dtype}"
        unit = 16 if dtype.itemsize == 2 else 32
        if weight.shape[0] % unit or weight.shape[1] % unit:
            return (
                f"needs outputs and inputs in multiples of {unit}; this weight is {weight.shape[0]} x {weight.shape[1]}"
            )
        return _unavailable(weight.device, dtype, wanted)

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """``compressed`` in a layout of the library's own; of int8 also ``scales`` (out,) float32 seen as integers."""
        _first_device[:] = _first_device or [weight.device]
        plain = weight.codes if isinstance(weight, QuantizedWeight) else weight
        compressed = torch._cslt_compress(plain.contiguous())
        packed = {"compressed": compressed.view(_HELD_AS[plain.dtype])}
        return packed | ({"scales": raw(weight.scales.flatten())} if isinstance(weight, QuantizedWeight) else {})

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight, times the identity: where the library keeps the mask is not documented.

        Exact but for the sign of a zero. Rows with a weight that is not finite come out as NaN.
        """
        compressed, dtype = packed["compressed"], _DTYPE_OF[packed["compressed"].dtype]
        weight = torch.empty(len(compressed), columns, dtype=dtype, device=compressed.device)
        for start in range(0, columns, _AT_ONCE):
            part = weight[:, start : start + _AT_ONCE]
            some = torch.zeros(part.shape[1], columns, dtype=torch.uint8, device=compressed.device)
            some.diagonal(start).fill_(1)
            part.copy_(torch.ops.compressllm.cusparselt_2to4(some.to(dtype), compressed, None).T)
        return weight * packed["scales"].view(torch.float32).unsqueeze(1) if "scales" in packed else weight

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). With an 8-bit weight each token is rounded to 8 bits, scaled by its largest value.

        Raises: BackendUnavailableError if ``x`` is not of the dtype of a 16-bit weight.
        """
        compressed, dtype = packed["compressed"], _DTYPE_OF[packed["compressed"].dtype]
        shape, rows = (*x.shape[:-1], len(compressed)), x.reshape(-1, x.shape[-1])
        if dtype.itemsize == 2:
            if x.dtype != dtype:
                raise BackendUnavailableError(
                    f"backend cusparselt: activations are {x.dtype}, the weight was packed as {dtype}; load the model "
                    "in the dtype it is to compute in"
                )
            return torch.ops.compressllm.cusparselt_2to4(rows, compressed, bias).view(shape)  # type: ignore[no-any-return]
        scale = (rows.abs().amax(-1, keepdim=True).float() / _LARGEST[dtype]).clamp(min=2.0**-100)
        small = (rows / scale).clamp(-_LARGEST[dtype], _LARGEST[dtype])
        small = (small.round() if dtype == torch.int8 else small).to(dtype)
        result: Tensor = torch.ops.compressllm.cusparselt_2to4(small, compressed, None) * scale
        if "scales" in packed:
            result = result * packed["scales"].view(torch.float32)
        return (result if bias is None else result + bias).to(x.dtype).view(shape)


def notes(device: torch.device) -> list[str]:
    """What is known of the library that is installed, for whoever wonders about its speed."""
    version, name = torch.backends.cusparselt.version(), torch.cuda.get_device_name(device)
    if version == 800 and any(slow in name for slow in ("H100", "H200", "L4")):
        return ["cuSPARSELt 0.8.0, which this torch was built with, lost speed on H100 and L4; 0.8.1 has it back"]
    return []


def _stored(weight: Tensor | QuantizedWeight) -> torch.dtype:
    return torch.int8 if isinstance(weight, QuantizedWeight) else weight.dtype


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _unavailable(device: torch.device, dtype: torch.dtype, wanted: bool) -> str | None:
    if device.type != "cuda":
        return f"runs on CUDA devices; the weight is on {device.type}"
    if torch.version.hip or not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt; install torch for CUDA"
    if _torch_version() < (2, 11):
        return f"needs torch 2.11 or newer, which this is not: {torch.__version__}"
    capability = torch.cuda.get_device_capability(device)
    least = (8, 9) if dtype == torch.float8_e4m3fn else (8, 0)
    if capability < least:
        return f"needs a GPU of compute capability {least[0]}.{least[1]} or more for {dtype}; this has {capability}"
    if capability >= (10, 0) and not wanted:
        return f"torch's operators for it are not tested on compute capability {capability[0]}.{capability[1]}"
    other = _first_device and _first_device[0] != device
    if other and _torch_version() < (2, 15):
        return (
            f"torch {torch.__version__} ties cuSPARSELt to the first GPU it runs on, here {_first_device[0]}, and this "
            f"weight is on {device}; use one process a GPU, or torch 2.15"
        )
    return None


@functools.cache
def _choices(device: torch.device) -> Choices:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Choices("cusparselt", {"gpu": name, "cusparselt": torch.backends.cusparselt.version()}, always=True)


def _run(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """(n, in) of the weight's dtype -> (n, out).

    Tokens are filled up to what the library takes: powers of two, so that few shapes occur, then multiples of 64. What
    the rows of filling hold does not matter.
    """
    dtype = _DTYPE_OF[compressed.dtype]
    (tokens, columns), rows, result = x.shape, len(compressed), _RESULT.get(dtype)
    if not tokens:
        return _like(x, compressed, bias)
    size = bucket(tokens, least=8 if dtype.itemsize == 2 else 16)
    full = size if tokens <= 256 else -(-tokens // 64) * 64
    if full != tokens:
        x, given = x.new_empty(full, columns), x
        x[:tokens] = given
    bias = None if bias is None else bias.to(x.dtype)
    arguments = (compressed.view(dtype), x.contiguous().T, bias, None, result)
    case = f"{rows}x{columns} {dtype}, {size} tokens"
    algorithm, splits, mode = _DEFAULT
    if dtype != torch.float16 or torch.backends.cusparselt.version() != 800:  # 0.8.0's search crashes on float16
        algorithm, splits, mode = _choices(x.device).get(case, functools.partial(_search, arguments), _DEFAULT)
    product = torch._cslt_sparse_mm(
        *arguments, transpose_result=True, alg_id=algorithm, split_k=splits, split_k_mode=mode
    )
    return product[:tokens]


def _search(arguments: tuple[Any, ...]) -> tuple[int, int, int]:
    """Algorithm, splits and mode that the library finds fastest for these very operands."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:
        compressed, dense, bias, alpha, result = arguments
        return int(torch._cslt_sparse_mm_search(compressed, dense, bias, alpha, result, transpose_result=True)), 1, -1
    algorithm, splits, mode, _ = search(*arguments, True)
    return algorithm, splits, mode


def _like(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    dtype = _DTYPE_OF[compressed.dtype]
    return x.new_empty(x.shape[0], compressed.shape[0], dtype=_RESULT.get(dtype, dtype))


torch.library.impl(_LIBRARY, "cusparselt_2to4", "CompositeExplicitAutograd")(_run)
torch.library.register_fake("compressllm::cusparselt_2to4", _like, lib=_LIBRARY)
