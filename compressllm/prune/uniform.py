"""The same sparsity everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from compressllm.core.protocols import ALLOCATORS, Allocation, DensePass
from compressllm.core.stats import Need


@ALLOCATORS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Give every linear the same sparsity."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def allocate(self, dense: DensePass, sizes: Mapping[str, int], sparsity: float) -> Allocation:
        """The same for all; looks at nothing."""
        return Allocation(dict.fromkeys(sizes, sparsity))
