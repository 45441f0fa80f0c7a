"""Settings of a selection."""

from __future__ import annotations

from pydantic import Field, field_validator

from compressllm.core.config import Config, Device, Dtype, method_of
from compressllm.core.protocols import SELECTORS


class ChoiceConfig(Config):
    """How many records are chosen, and how."""

    method: method_of(SELECTORS) = "paser"  # type: ignore[valid-type]
    """How records are chosen: a name from `compressllm list selectors`, or {name: {option: value}}."""
    budget: float = Field(default=0.2, gt=0)
    """Fraction of the usable records to choose, up to 1; or, above 1, how many."""

    @field_validator("budget")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value} is neither a fraction up to 1 nor a whole number of records")
        return value

    def records_of(self, usable: int) -> int:
        """How many records to choose of so many; at least one, at most all."""
        return min(usable, max(1, round(self.budget * usable)) if self.budget <= 1 else int(self.budget))


class SelectConfig(ChoiceConfig):
    """Choose the records that recovery training learns from."""

    max_tokens: int = Field(default=512, ge=8)
    """Tokens of prompt and response together that are looked at, as many as training will see."""
    dtype: Dtype = "auto"
    """Dtype of the forward passes. A model already in memory keeps its dtype."""
    device: Device = "auto"
    """Where the forward passes run. A model already in memory stays where it is."""
