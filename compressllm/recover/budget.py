"""How far pruned weights can decay in a training, and whether that is far enough; before a long run, not after it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from compressllm.core.errors import RecipeError
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle
from compressllm.recover.config import RecoverConfig, rate_of
from compressllm.recover.held import find_held, weights_of

#: Times the mean masked weight that decay should be able to go.
_HEADROOM: Final = 2.0


@dataclass(frozen=True)
class DecayBudget:
    """What decay can do under Adam, whose steps do not depend on how strong the decay is once it outweighs gradients.

    Args:
        steps: Of the training.
        reachable: The farthest that a weight can go: the sum of the learning rates, under deferred each times the
            share that decay then has of the step.
        masked_mean: Mean |W| of the weights that the first masks prune.
        masked_max: The largest of them.
        residual: About what is left of a weight that has decayed: the last steps' size.
    """

    steps: int
    reachable: float
    masked_mean: float
    masked_max: float
    residual: float

    @property
    def headroom(self) -> float | None:
        """Times the mean masked weight that is reachable; None if these are zero already."""
        return self.reachable / self.masked_mean if self.masked_mean else None

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        room = "they are zero already" if self.headroom is None else f"{self.headroom:.1f} times their mean"
        return (
            f"in {self.steps} steps a pruned weight can decay by {self.reachable:.4g}; masked weights: mean "
            f"{self.masked_mean:.4g}, largest {self.masked_max:.4g} ({room}); about {self.residual:.2g} stays"
        )

    @property
    def short(self) -> str | None:
        """What is wrong with it, or None."""
        if self.headroom is None or self.headroom >= _HEADROOM:
            return None
        return (
            f"decay reaches {self.headroom:.2g} times the mean masked weight, and {_HEADROOM:g} are needed for masks "
            "to settle; train longer or raise lr"
        )

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "headroom": self.headroom, "warning": self.short}


def decay_budget(bundle: Bundle, config: RecoverConfig, run: Run) -> DecayBudget:
    """The budget of a training with these settings. Reads every weight once.

    Raises: RecipeError if masks stay, so that nothing decays; as `find_held`.

    Source: CAST's decay distance, arXiv 2509.25996, as its independent reproduction counts it.
    """
    if config.masking not in ("ast", "deferred"):
        raise RecipeError(f"masking {config.masking}: has no weights that decay; give masking ast or deferred")
    held = find_held(bundle, config, run)
    total, count, largest = 0.0, 0, 0.0
    for name, weight in weights_of(bundle, held.linears):
        masked = weight[~held.masks[name]].float().abs()
        if masked.numel():
            total, count = total + float(masked.sum()), count + masked.numel()
            largest = max(largest, float(masked.max()))
    rates = [rate_of(step, config) for step in range(config.steps)]
    shares = [step / config.steps if config.masking == "deferred" else 1.0 for step in range(config.steps)]
    reachable = sum(rate * share for rate, share in zip(rates, shares, strict=True))
    return DecayBudget(config.steps, reachable, total / max(1, count), largest, min(rates[-1], config.lr))
