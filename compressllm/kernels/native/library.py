"""The compiled kernels in this process: which instruction set runs, and that it computes what it should."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressllm.core.errors import BackendUnavailableError
from compressllm.kernels.native.build import Build, build, openmp_in_process
from compressllm.kernels.native.isa import ISAS, isas_here

SWITCH, CHOSEN_ISA = "COMPRESSLLM_NATIVE", "COMPRESSLLM_ISA"
_BLOCK_ROWS = 16  # as kernel.h has it
_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as kernel.h numbers them
_POINTER, _INTEGER, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@dataclass(frozen=True)
class Kernel:
    """One format's kernel on one instruction set, ready to be called.

    Args:
        name: Its format's.
        isa: The instruction set it is written for.
        format, tile: Addresses of its ``struct format`` and its ``tile_fn``.
        block_columns: Columns of a block, of the 16 rows that all formats have.
    """

    name: str
    isa: str
    format: int
    tile: int
    block_columns: int


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Args:
        build: Where it came from.
        c: Its functions.
        isas: The instruction sets this processor has, lowest first, up to the one forced.
        refused: Instruction set -> why it is not used here.
    """

    build: Build
    c: ctypes.CDLL
    isas: tuple[str, ...]
    refused: Mapping[str, str]
    _kernels: dict[tuple[str, str | None], Kernel] = field(default_factory=dict)

    def kernel(self, format: str, isa: str | None = None) -> Kernel:
        """The kernel of a format on the highest instruction set that has one and passes its check, or on ``isa``.

        Raises: BackendUnavailableError if ``isa`` has none here.
        """
        if (format, isa) not in self._kernels:
            self._kernels[format, isa] = self._find(format, isa)
        return self._kernels[format, isa]

    def _find(self, format: str, isa: str | None) -> Kernel:
        oracle = self._address(format, "scalar")
        if oracle is None:
            raise BackendUnavailableError(f"the kernel library has no {format}_tile_scalar")
        for name in reversed(self.isas) if isa is None else [isa]:
            kernel = self._address(format, name) if name in self.isas else None
            if kernel is None:
                continue
            if difference := differs(self, kernel, oracle):
                warnings.warn(f"{format} kernel for {name} is not used: {difference}", RuntimeWarning, stacklevel=2)
                continue
            return kernel
        raise BackendUnavailableError(f"no {format} kernel for {isa or 'any instruction set'} runs here")

    def _address(self, format: str, isa: str) -> Kernel | None:
        try:
            # The first field of a struct format is its block_columns.
            columns, tile = _INTEGER.in_dll(self.c, f"{format}_format"), getattr(self.c, f"{format}_tile_{isa}")
        except (AttributeError, ValueError):
            return None
        return Kernel(
            format, isa, ctypes.addressof(columns), ctypes.cast(tile, _POINTER).value or 0, int(columns.value)
        )

    def linear(self, kernel: Kernel, x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """(..., in) -> (..., rows), in the dtype of ``x``: float32 or bfloat16.

        Args:
            blocks: (blocks of 16 rows, blocks of the format's columns, ...), contiguous, on the CPU; or (bytes,), of a
                format whose blocks differ in size.

        Raises: RuntimeError for other dtypes and for shapes that do not fit, as torch does.
        """
        *leading, columns = x.shape
        needed = (-(-rows // _BLOCK_ROWS), -(-columns // kernel.block_columns))
        if x.dtype not in _TYPES:
            raise RuntimeError(f"native kernels take float32 and bfloat16 inputs, not {x.dtype}")
        if (blocks.dim() > 1 and blocks.shape[:2] != needed) or (bias is not None and bias.shape != (rows,)):
            raise RuntimeError(
                f"{tuple(x.shape)} inputs and {rows} outputs need {needed} blocks, not {tuple(blocks.shape[:2])}, "
                f"and a bias of ({rows},)"
            )
        if not x.is_contiguous():
            x = x.contiguous()
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        y = x.new_empty((*leading, rows))
        failed = self.c.linear(
            kernel.format,
            kernel.tile,
            y.data_ptr(),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            blocks.data_ptr(),
            math.prod(leading),
            rows,
            columns,
            _TYPES[x.dtype],
        )
        if failed:
            raise MemoryError(f"no memory for the inputs of a linear: {tuple(x.shape)}")
        return y


#: Format -> makes (blocks, rows, columns), a small awkward weight in that format, to check its kernels on.
SAMPLES: dict[str, Callable[[Library], tuple[Tensor, int, int]]] = {}
_ROUNDING = 1e-4  # of the largest output: many times what the order of a few hundred float32 sums changes


def differs(library: Library, kernel: Kernel, oracle: Kernel) -> str | None:
    """How a kernel's results differ from the scalar kernel's on a small problem, or None.

    Most machines cannot run most instruction sets, so that no test on one of them can vouch for all.
    """
    if kernel == oracle:
        return None
    blocks, rows, columns = SAMPLES[kernel.name](library)
    random = torch.Generator().manual_seed(0)
    for tokens in (*range(1, 9), 19):
        x = torch.randn(tokens, columns, generator=random)
        got, right = (library.linear(one, x, blocks, None, rows) for one in (kernel, oracle))
        if not (error := (got - right).abs().max()) <= _ROUNDING * right.abs().max():  # a NaN differs too
            return f"it is off by {error:.2g} of {right.abs().max():.2g} from the scalar kernel at {tokens} tokens"
    return None


def library() -> Library:
    """The library, built and loaded on the first call.

    Raises: BackendUnavailableError with the reason why there is none.
    """
    loaded = _load(os.environ.get(SWITCH, ""), os.environ.get(CHOSEN_ISA, ""))
    if isinstance(loaded, str):
        raise BackendUnavailableError(loaded)
    return loaded


def unavailable() -> str | None:
    """Why there are no native kernels here, or None."""
    try:
        library()
    except BackendUnavailableError as error:
        return str(error)
    return None


@functools.cache
def _load(switch: str, isa: str) -> Library | str:
    """The library, or why there is none: so that a failed build is not tried again for every linear."""
    if switch == "0":
        return f"switched off by {SWITCH}=0"
    try:
        built = build()
        c = ctypes.CDLL(str(built.library))
    except (BackendUnavailableError, OSError) as error:
        reason = str(error) if isinstance(error, BackendUnavailableError) else f"cannot be loaded: {error}"
        warnings.warn(f"no native CPU kernels, sparse linears run dense: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    _declare(c)
    names = [one.name for one in isas_here()]
    refused: dict[str, str] = {one.name: "is for another architecture" for one in ISAS if one.name not in names}
    usable = []
    for name in names:
        if name not in built.isas:
            refused[name] = built.skipped.get(name, "no kernel is written for it")
        elif not c.cpu_has(name.encode()):
            refused[name] = "this processor does not have it"
        else:
            usable.append(name)
    if isa:
        if isa not in usable:
            known = ", ".join(one.name for one in ISAS)
            return f"{CHOSEN_ISA}={isa}: {refused.get(isa, f'is none of {known}')}; usable here: {', '.join(usable)}"
        for name in usable[usable.index(isa) + 1 :]:
            refused[name] = f"{CHOSEN_ISA}={isa}"
        usable = usable[: usable.index(isa) + 1]
    return Library(built, c, tuple(usable), refused)


def best_function(name: str, agrees: Callable[[Any], bool]) -> Any:
    """The C function ``NAME_ISA`` of the highest instruction set that has one and agrees with torch, or None.

    Args:
        agrees: Runs it on a small case; one that does not agree is warned of and left out.
    """
    try:
        loaded = library()
    except BackendUnavailableError:
        return None  # torch computes the same
    for isa in reversed(loaded.isas):
        function = getattr(loaded.c, f"{name}_{isa}", None)
        if function is None:
            continue
        if agrees(function):
            return function
        warnings.warn(
            f"{name} for {isa} is not used: it does not compute what torch does", RuntimeWarning, stacklevel=2
        )
    return None


def shares_threads(loaded: Library) -> bool:
    """Whether the library's OpenMP is the one torch runs on."""
    return loaded.build.openmp is not None and loaded.build.openmp == openmp_in_process()


def _declare(c: Any) -> None:
    """Argument types of the library's functions; formats declare their own packing."""
    c.linear.argtypes = [*[_POINTER] * 6, *[_INTEGER] * 3, _NUMBER]
    c.linear.restype = _NUMBER
    c.cpu_has.argtypes = [ctypes.c_char_p]
    c.threads.restype = _INTEGER
    c.stream_read.argtypes = [_POINTER, _INTEGER]
    c.stream_read.restype = ctypes.c_uint64
