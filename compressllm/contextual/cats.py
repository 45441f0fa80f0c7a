"""CATS: neurons whose gate is above a threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from compressllm.contextual.mlp import find_mlp
from compressllm.contextual.seen import at_quantile, inputs_of, magnitude_table
from compressllm.core.errors import RecipeError
from compressllm.core.protocols import NEURON_SELECTORS, BlockPass


@NEURON_SELECTORS.register("cats")
@dataclass(frozen=True)
class Cats:
    """A set a token: neurons whose gate activation is above a threshold, one an MLP, calibrated on text.

    ``|act(gate x)_j| > t``, with ``t`` the quantile of ``|act(gate x)|`` that leaves the density above it. How many a
    token keeps varies; up's rows and down's columns of the others are not read.

    Source: Lee et al., CATS, arXiv 2404.08763, equation 3; quantiles are exact in place of their histogram's.
    """

    level: ClassVar[Literal["prompt", "token", "input"]] = "token"
    calibrated: ClassVar[bool] = True
    gated: ClassVar[bool] = True
    _cuts: dict[tuple[str, float], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def fit(self, blocks: Callable[[], Iterator[BlockPass]]) -> dict[str, Tensor]:
        """MLP name -> quantiles of the gate's magnitude."""
        tables = {}
        for block in blocks():
            mlp = find_mlp(block.module, block.name)
            seen = [mlp.act(mlp.gate(batch[0])) for batch in inputs_of(block, [mlp.gate.module])]
            tables[mlp.name] = magnitude_table(seen, mlp.name)
        return tables

    def keep(self, values: Tensor, density: float, mlp: str, fitted: Mapping[str, Tensor]) -> Tensor:
        """Above the threshold."""
        cut = self._cuts.get((mlp, density))
        if cut is None:
            if mlp not in fitted:
                raise RecipeError(f"neuron selector cats: its calibration has no {mlp}; calibrate it on this model")
            cut = self._cuts.setdefault((mlp, density), at_quantile(fitted[mlp], 1 - density))
        return values.abs() > cut
