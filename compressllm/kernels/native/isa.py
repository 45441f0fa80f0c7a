"""Instruction sets the C kernels are written for."""

from __future__ import annotations

import platform
from dataclasses import dataclass

_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_VNNI = (*_AVX512, "-mavx512vnni")


@dataclass(frozen=True)
class ISA:
    """One instruction set.

    Args:
        name: As in ``COMPRESSLLM_ISA``; the sources ``c/*_{name}.c`` are compiled for it.
        flags: The compiler's flags for it.
        machines: Names of the architecture, as Python's `platform.machine` has them; empty for any.
    """

    name: str
    flags: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()


#: From the lowest to the highest: each includes those before it of its machine.
ISAS = (
    ISA("scalar"),
    ISA("neon", (), _ARM),
    ISA("avx2", _AVX2, _X86),
    ISA("avx512", _AVX512, _X86),
    ISA("avx512vnni", _VNNI, _X86),
    ISA("amx", (*_VNNI, "-mpopcnt", "-mavx512vbmi2", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"), _X86),
)


def isas_here() -> list[ISA]:
    """Those of this machine's architecture, lowest first; the processor need not have them."""
    machine = platform.machine().lower()
    return [isa for isa in ISAS if not isa.machines or machine in isa.machines]
