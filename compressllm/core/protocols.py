"""The protocols a method implements, and the registry of each. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from compressllm.core.pattern import Group, SparsityPattern
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.registry import REGISTRY_OF, Registry
from compressllm.core.scheme import Scheme
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


@dataclass(frozen=True)
class Quantized:
    """One quantised weight.

    Args:
        weight: Its codes and scales; code 0 wherever it is pruned.
        notes: What the method has to say of this linear, as plain data for its row in the manifest.
        fallback: What it did instead of what was asked for, in one line, or None; warned of and recorded.
    """

    weight: QuantizedWeight
    notes: Mapping[str, Any] = field(default_factory=dict)
    fallback: str | None = None


class Quantizer(Protocol):
    """Rounds the weights of one linear to a scheme's grid. Pruned weights stay exactly zero.

    ``needs`` names the input statistics it reads.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics it reads."""
        ...

    def quantize(self, weight: Tensor, keep: Tensor, stats: InputStats, scheme: Scheme) -> Quantized:
        """Quantise an (out, in) float32 weight, +0.0 wherever the (out, in) bool ``keep`` is False.

        Does not change its arguments. Raises: FormatError, CalibrationError.
        """
        ...


@dataclass(frozen=True)
class DenseLinear:
    """One linear before anything of the model is pruned.

    Args:
        read: Gives its (out, in) weight in float32, read anew at every call. Not to be changed.
        stats: Statistics of its inputs, those the method `needs`.
    """

    read: Callable[[], Tensor]
    stats: InputStats


#: One pass over the dense model, front to back: for each block its name and its linears, valid until the next block.
DensePass = Callable[[], Iterator[tuple[str, Mapping[str, DenseLinear]]]]


@dataclass(frozen=True)
class Allocation:
    """How a sparsity is spread over a model.

    Args:
        sparsity: Linear name -> fraction removed.
        notes: What it rests on, as plain data for the manifest.
    """

    sparsity: Mapping[str, float]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Allocator(Protocol):
    """Spreads an unstructured sparsity over the linears of a model, so that their weighted mean is what was asked."""

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics of the dense model it reads; without any, a pass computes nothing but reads weights."""
        ...

    def allocate(self, dense: DensePass, sizes: Mapping[str, int], sparsity: float) -> Allocation:
        """Linear name -> sparsity, of every linear in ``sizes``.

        Args:
            dense: Walks the dense model once at every call; not called by a method that looks at nothing.
            sizes: Linear name -> number of weights, front to back.
            sparsity: Fraction to remove of all of them together.
        """
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
    """Computes a linear from a packed weight, which may be a quantised one: a backend that cannot refuses it.

    ``rank`` orders backends by how fast they are where they run; ``auto`` takes the highest that does not refuse.
    """

    rank: ClassVar[int]

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Why this backend cannot run this weight here, or None if it can.

        Args:
            wanted: It was asked for by name, so that being slow is no reason to refuse.
        """
        ...

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """The backend's own in-memory form of an (out, in) weight, zero wherever ``keep`` is False. Never saved."""
        ...

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight again, bit for bit; ``columns`` is in. Of a quantised one its codes times scales."""
        ...

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        ...


class Adapter(Protocol):
    """Trains a small share of a pruned model, such that what is merged keeps exactly the same zeros."""

    def attach_(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Freeze all but what is trained, which then are the parameters that require gradients. Changes ``model``.

        Args:
            masks: Linear name -> (out, in) bool mask.

        Raises: RecipeError, UnsupportedModelError, FormatError; nothing is changed then.
        """
        ...

    def merge_(self, model: nn.Module) -> None:
        """Leave the model with the modules it had, and what was trained in their weights. Changes ``model``."""
        ...


SOURCES: Registry[TextSource] = Registry("text source", "compressllm.calibration")
PRUNERS: Registry[Pruner] = Registry("pruner", "compressllm.prune")
ALLOCATORS: Registry[Allocator] = Registry("allocator", "compressllm.prune")
FORMATS: Registry[Format] = Registry("format", "compressllm.export")
BACKENDS: Registry[Backend] = Registry("backend", "compressllm.kernels")
ADAPTERS: Registry[Adapter] = Registry("adapter", "compressllm.recover.adapters")
QUANTIZERS: Registry[Quantizer] = Registry("quantizer", "compressllm.quantize")

REGISTRY_OF.update({TextSource: SOURCES, Pruner: PRUNERS, Allocator: ALLOCATORS, Format: FORMATS, Backend: BACKENDS})
REGISTRY_OF.update({Adapter: ADAPTERS, Quantizer: QUANTIZERS})

#: The registries by the name ``compressllm list`` takes.
REGISTRIES: dict[str, Registry[Any]] = {
    "adapters": ADAPTERS,
    "allocators": ALLOCATORS,
    "backends": BACKENDS,
    "formats": FORMATS,
    "pruners": PRUNERS,
    "quantizers": QUANTIZERS,
    "sources": SOURCES,
}
