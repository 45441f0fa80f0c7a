"""The protocols a method implements, and the registry of each. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from compressllm.core.pattern import Group, SparsityPattern
from compressllm.core.registry import REGISTRY_OF, Registry
from compressllm.core.stats import InputStats, Need

#: What text is wanted for: methods are fitted on one part, and measured on the other.
Split = Literal["calibration", "evaluation"]


class TextSource(Protocol):
    """Documents to calibrate or evaluate on."""

    def texts(self, split: Split) -> Iterator[str]:
        """Documents in their stored order. Raises CalibrationError if there are none to be had."""
        ...


@dataclass(frozen=True)
class Pruned:
    """One pruned weight.

    Args:
        keep: (out, in) bool, True = kept.
        weight: (out, in) float32, +0.0 wherever ``keep`` is False.
        notes: What the method has to say of this linear, as plain data for its row in the manifest.
        fallback: What it did instead of what was asked for, in one line, or None; warned of and recorded.
    """

    keep: Tensor
    weight: Tensor
    notes: Mapping[str, Any] = field(default_factory=dict)
    fallback: str | None = None


class Pruner(Protocol):
    """Chooses which weights of one linear stay, and may change those that do.

    ``needs`` names the input statistics it reads; ``group`` is where unstructured scores compete unless the
    pattern says otherwise.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics it reads."""
        ...

    @property
    def group(self) -> Group:
        """Where unstructured scores compete."""
        ...

    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Prune an (out, in) float32 weight. Does not change its arguments."""
        ...


class Format(Protocol):
    """How a pruned linear's weight lies on disk.

    ``tensors`` are the last parts of the names `pack` yields. The first holds the values, in the weight's dtype;
    a format of ``("weight",)`` alone is what any loader opens.
    """

    tensors: ClassVar[tuple[str, ...]]

    def layout(self, name: str, dtype: torch.dtype, keep: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensor name -> dtype and shape of what `pack` yields for a weight of ``dtype`` under this (out, in) mask."""
        ...

    def pack(self, name: str, weight: Tensor, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Named tensors that stand for the (out, in) ``weight`` of linear ``name``, +0.0 wherever ``keep`` is False."""
        ...

    def unpack(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor:
        """The (out, in) weight, bit for bit, from what `pack` wrote. Raises FormatError."""
        ...

    def mask(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor | None:
        """The (out, in) bool mask, or None if the format does not hold it. Raises FormatError."""
        ...


class Backend(Protocol):
    """Computes a linear from a packed weight.

    ``rank`` orders backends by how fast they are where they run; ``auto`` takes the highest that does not refuse.
    """

    rank: ClassVar[int]

    def refuses(self, weight: Tensor, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Why this backend cannot run this weight here, or None if it can.

        Args:
            wanted: It was asked for by name, so that being slow is no reason to refuse.
        """
        ...

    def pack(self, weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """The backend's own in-memory form of an (out, in) weight, zero wherever ``keep`` is False. Never saved."""
        ...

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight again, bit for bit; ``columns`` is in."""
        ...

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        ...


SOURCES: Registry[TextSource] = Registry("text source", "compressllm.calibration")
PRUNERS: Registry[Pruner] = Registry("pruner", "compressllm.prune")
FORMATS: Registry[Format] = Registry("format", "compressllm.export")
BACKENDS: Registry[Backend] = Registry("backend", "compressllm.kernels")

REGISTRY_OF.update({TextSource: SOURCES, Pruner: PRUNERS, Format: FORMATS, Backend: BACKENDS})

#: The registries by the name ``compressllm list`` takes.
REGISTRIES: dict[str, Registry[Any]] = {
    "backends": BACKENDS,
    "formats": FORMATS,
    "pruners": PRUNERS,
    "sources": SOURCES,
}
