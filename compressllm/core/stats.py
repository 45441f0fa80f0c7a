"""What one linear saw on its inputs: means over tokens, in float32."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError
from compressllm.core.gram import add_gram_, mirror_

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

    def in_order(self, order: Tensor) -> InputStats:
        """The same of inputs in another order, (in,) int64; what was derived is derived anew."""

        def ordered(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.index_select(-1, order.to(value.device))

        hessian = ordered(self.hessian)
        return replace(
            self,
            mean=ordered(self.mean),
            var=ordered(self.var),
            sqnorm=ordered(self.sqnorm),
            hessian=None if hessian is None else ordered(hessian.T),
        )

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
        totals: Statistic -> its sum over tokens; for ``var``, the sum of squared deviations from the mean so far; of
            ``hessian``, the lower triangle.
    """

    needs: frozenset[Need]
    tokens: int = 0
    totals: dict[Need, Tensor] = field(default_factory=dict)

    def add_(self, inputs: Tensor) -> None:
        """Count a batch of inputs: (..., in), any float dtype. Every row is one token."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        batch = StatsAccumulator(self.needs - {"hessian"}, tokens=x.shape[0])
        if self.needs & {"mean", "var"}:
            batch.totals["mean"] = x.sum(0)
        if "var" in self.needs and batch.tokens:
            batch.totals["var"] = (x - batch.totals["mean"] / batch.tokens).square_().sum(0)
        if "sqnorm" in self.needs:
            batch.totals["sqnorm"] = x.square().sum(0)
        self.merge_(batch)
        if "hessian" in self.needs and batch.tokens:
            self.add_gram_(x)

    def add_gram_(self, x: Tensor) -> None:
        """Count (tokens, in) inputs into the Hessian alone; their number, and the rest, come by `merge_`."""
        if "hessian" not in self.totals:
            self.totals["hessian"] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        add_gram_(self.totals["hessian"], x.float())

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
        for name, total in other.totals.items():
            self.totals[name].add_(total)
        self.tokens += other.tokens

    def finish(self, name: str) -> InputStats:
        """The means. Ends the accumulator: its memory becomes theirs.

        Raises: CalibrationError naming the linear if it saw no token or a value that is not finite.
        """
        if not self.tokens:
            raise CalibrationError(f"{name}: saw no token during calibration; give it more text or name it under skip")
        self.check_finite(name)
        totals, self.totals = self.totals, {}
        with torch.inference_mode():  # totals may have been made in it, and could not be changed outside
            if "hessian" in totals:
                mirror_(totals["hessian"])
            means = {stat: total.div_(self.tokens) for stat, total in totals.items()}
        return InputStats(self.tokens, means.get("mean"), means.get("var"), means.get("sqnorm"), means.get("hessian"))

    def check_finite(self, name: str) -> None:
        """Raise CalibrationError naming the linear if it saw a value that is not finite."""
        for total in self.totals.values():
            if not torch.isfinite(total).all():
                raise CalibrationError(
                    f"{name}: input activations are not finite; check the checkpoint, or calibrate with --dtype float32"
                )
