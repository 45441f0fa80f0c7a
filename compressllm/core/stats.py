"""What one linear saw on its inputs: means over tokens, in float32."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError

T = TypeVar("T")

#: A statistic a method can ask for: per-input mean, variance and mean square, or the (in, in) second moment.
Need = Literal["mean", "var", "sqnorm", "hessian"]


@dataclass(frozen=True)
class InputStats:
    """Statistics of one linear's inputs, as means over the tokens it saw.

    Args:
        tokens: Number of tokens seen.
        mean: (in,) float32 mean input, or None if not asked for.
        var: (in,) float32 biased variance over tokens.
        sqnorm: (in,) float32 mean of squares, ``||X_j||_2^2 / tokens``.
        hessian: (in, in) float32 ``X^T X / tokens``.
        pooled: Why statistics of other linears' inputs are in them, in one line, or None; ``tokens`` counts both.
    """

    tokens: int
    mean: Tensor | None = None
    var: Tensor | None = None
    sqnorm: Tensor | None = None
    hessian: Tensor | None = None
    pooled: str | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derive(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` computes from these statistics, computed once.

        Linears that are called with the same tensor (q, k and v; gate and up) are given the same object, so that a
        factor of their Hessian, say, is made once for all of them and lives as long as the statistics.

        Args:
            key: Names what is computed, every setting it depends on included.
        """
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[no-any-return]

    def need(self, name: Need) -> Tensor:
        """The statistic ``name``.

        Raises: CalibrationError if it was not collected.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise CalibrationError(f"input statistic {name!r} was not collected; name it in the method's `needs`")
        return value


@dataclass
class StatsAccumulator:
    """Running InputStats of one linear, fed batch by batch; accumulators merge, so shards can be combined.

    Totals are kept in float32 whatever the inputs' dtype: one activation of 256 already squares past float16's range.

    Args:
        needs: What to collect.
        tokens: Tokens counted so far.
        totals: Statistic -> its sum over tokens; for ``var``, the sum of squared deviations from the mean so far.
    """

    needs: frozenset[Need]
    tokens: int = 0
    totals: dict[Need, Tensor] = field(default_factory=dict)

    def add_(self, inputs: Tensor) -> None:
        """Count a batch of inputs: (..., in), any float dtype. Every row is one token."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        batch = StatsAccumulator(self.needs, tokens=x.shape[0])
        if self.needs & {"mean", "var"}:
            batch.totals["mean"] = x.sum(0)
        if "var" in self.needs and batch.tokens:
            batch.totals["var"] = (x - batch.totals["mean"] / batch.tokens).square_().sum(0)
        if "hessian" in self.needs:
            batch.totals["hessian"] = x.T @ x
        if "sqnorm" in self.needs:
            gram = batch.totals.get("hessian")
            batch.totals["sqnorm"] = gram.diagonal().clone() if gram is not None else x.square().sum(0)
        self.merge_(batch)

    def merge_(self, other: StatsAccumulator) -> None:
        """Count everything ``other`` has seen. Changes this accumulator only."""
        if not other.tokens:
            return
        if not self.tokens:
            self.tokens = other.tokens
            self.totals = {name: total.clone() for name, total in other.totals.items()}  # ours are added to in place
            return
        if "var" in self.needs:  # Chan's rule: the spread between the two means counts too
            apart = other.totals["mean"] / other.tokens - self.totals["mean"] / self.tokens
            self.totals["var"].add_(apart.square_(), alpha=self.tokens * other.tokens / (self.tokens + other.tokens))
        for name, total in self.totals.items():
            total.add_(other.totals[name])
        self.tokens += other.tokens

    def finish(self, name: str) -> InputStats:
        """The means so far.

        Raises: CalibrationError naming the linear if it saw no token or a value that is not finite.
        """
        if not self.tokens:
            raise CalibrationError(f"{name}: saw no token during calibration; give it more text or name it under skip")
        self.check_finite(name)
        means = {stat: total / self.tokens for stat, total in self.totals.items()}
        return InputStats(self.tokens, means.get("mean"), means.get("var"), means.get("sqnorm"), means.get("hessian"))

    def check_finite(self, name: str) -> None:
        """Raise CalibrationError naming the linear if it saw a value that is not finite."""
        for total in self.totals.values():
            if not torch.isfinite(total).all():
                raise CalibrationError(
                    f"{name}: input activations are not finite; check the checkpoint, or calibrate with --dtype float32"
                )
