"""Which losses a student is trained with, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from compressllm.core.errors import RecipeError
from compressllm.core.registry import did_you_mean


@dataclass(frozen=True)
class LossWeights:
    """How much each loss counts in the sum, as given: the weights need not add up to 1.

    Args:
        ce: Cross entropy with the next token.
        kl: KL(teacher || student) of next-token distributions at a temperature T, times T^2.
        reverse_kl: KL(student || teacher), likewise.
        squarehead: Relative squared distance of block outputs from the teacher's.

    Raises: RecipeError if a weight is negative or not a number, or if all are 0.
    """

    ce: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0
    squarehead: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise RecipeError(f"losses: {name} has weight {weight}; give a number of 0 or more")
        if not any(asdict(self).values()):
            raise RecipeError("losses: none has a weight above 0; give one as in kl=1.0")

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any]) -> LossWeights:
        """Weights from ``kl=1.0,squarehead=0.5``, or from a mapping of the same names.

        Raises: RecipeError for an unknown or repeated name and for what is not a number.
        """
        pairs = list(spec.items()) if isinstance(spec, Mapping) else [_pair(part) for part in spec.split(",")]
        known = [field.name for field in fields(cls)]
        weights: dict[str, float] = {}
        for name, value in pairs:
            if name not in known:
                raise RecipeError(f"losses: unknown loss {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}")
            if name in weights:
                raise RecipeError(f"losses: {name} is given twice")
            try:
                weights[name] = float(value)
            except (TypeError, ValueError):
                raise RecipeError(f"losses: {name}={value!r} is not a number; give one as in {name}=1.0") from None
        return cls(**weights)

    @property
    def at_head(self) -> bool:
        """Whether any of them is computed from logits."""
        return bool(self.ce or self.kl or self.reverse_kl)

    @property
    def need_teacher(self) -> bool:
        """Whether any of them looks at a teacher."""
        return bool(self.kl or self.reverse_kl or self.squarehead)

    def __str__(self) -> str:
        return ",".join(f"{name}={weight:g}" for name, weight in asdict(self).items() if weight)


def _pair(part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    if not equals:
        raise RecipeError(f"losses: {part.strip()!r} has no weight; write kl=1.0,squarehead=0.5")
    return name.strip(), value.strip()
