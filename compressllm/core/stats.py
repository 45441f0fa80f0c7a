"""What one linear saw on its inputs: means over tokens, in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError

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
    """

    tokens: int
    mean: Tensor | None = None
    var: Tensor | None = None
    sqnorm: Tensor | None = None
    hessian: Tensor | None = None

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

    Sums are kept in float32 whatever the inputs' dtype: one activation of 256 already squares past float16's range.
    """

    needs: frozenset[Need]
    tokens: int = 0
    _sum: Tensor | None = field(default=None, repr=False)
    _centred: Tensor | None = field(default=None, repr=False)  # sum of squared deviations, by Chan's rule
    _square: Tensor | None = field(default=None, repr=False)
    _gram: Tensor | None = field(default=None, repr=False)

    def add_(self, inputs: Tensor) -> None:
        """Count a batch of inputs: (..., in), any float dtype. Every row is one token."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        batch = StatsAccumulator(self.needs, tokens=x.shape[0])
        if self.needs & {"mean", "var"}:
            batch._sum = x.sum(0)
        if "var" in self.needs and batch._sum is not None:
            batch._centred = (x - batch._sum / max(1, batch.tokens)).square_().sum(0)
        if "hessian" in self.needs:
            batch._gram = x.T @ x
        if "sqnorm" in self.needs:
            batch._square = batch._gram.diagonal().clone() if batch._gram is not None else x.square().sum(0)
        self.merge_(batch)

    def merge_(self, other: StatsAccumulator) -> None:
        """Count everything ``other`` has seen. Changes this accumulator only."""
        if not other.tokens:
            return
        if not self.tokens:
            self.tokens = other.tokens
            self._sum, self._centred, self._square, self._gram = other._sum, other._centred, other._square, other._gram
            return
        if self._centred is not None:
            assert self._sum is not None and other._sum is not None and other._centred is not None  # set together
            apart = other._sum / other.tokens - self._sum / self.tokens
            shift = self.tokens * other.tokens / (self.tokens + other.tokens)
            self._centred = self._centred + other._centred + apart.square() * shift
        for name in ("_sum", "_square", "_gram"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                setattr(self, name, mine + theirs if name != "_gram" else mine.add_(theirs))
        self.tokens += other.tokens

    def finish(self, name: str) -> InputStats:
        """The means so far.

        Raises: CalibrationError naming the linear if it saw no token or a value that is not finite.
        """
        if not self.tokens:
            raise CalibrationError(f"{name}: saw no token during calibration; give it more text or name it under skip")

        def mean(total: Tensor | None) -> Tensor | None:
            if total is None:
                return None
            if not torch.isfinite(total).all():
                raise CalibrationError(
                    f"{name}: input activations are not finite; "
                    "check the checkpoint, or calibrate with --dtype float32"
                )
            return total / self.tokens

        return InputStats(self.tokens, mean(self._sum), mean(self._centred), mean(self._square), mean(self._gram))
