"""How far a training is, and what was measured on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """How far training is, and what was measured on the way; kept in checkpoints.

    Args:
        step: Steps done.
        tokens: That they were trained on, over all processes.
        seconds: That they took.
        teacher: The teacher's mean cross entropy on the held-out windows.
        before: The student's before the first step.
        held_out: The same now.
        lowest: The lowest so far, of what is trained.
        best: The lowest after a step, which step, and the name its weights are kept under unless it is the last.
        masks: What the last choice of masks came to.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    teacher: float | None = None
    before: float = math.inf
    held_out: float = math.inf
    lowest: float = math.inf
    best: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What training came to, for the manifest. The gap is that between the teacher and the student before it."""
        nlls = {"before": self.before, "after": self.best["nll"], "teacher": self.teacher}
        perplexity = {name: math.exp(min(nll, 700.0)) for name, nll in nlls.items() if nll is not None}
        gap = perplexity["before"] - perplexity.get("teacher", math.inf)
        closed = (perplexity["before"] - perplexity["after"]) / gap if 0 < gap < math.inf else None
        return {
            "steps": self.step,
            "best_step": self.best["step"],
            "tokens": self.tokens,
            "training_seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "held_out_perplexity": perplexity,
            "gap_closed": closed,
            "masks_last_refresh": self.masks or None,
        }
