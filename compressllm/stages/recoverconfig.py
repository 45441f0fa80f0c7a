"""Settings of the recover stage: those of the training, and of the choice of its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field, field_validator, model_validator

from compressllm.core.errors import CompressError, RecipeError
from compressllm.core.protocols import SELECTORS
from compressllm.core.registry import build, split_spec
from compressllm.recover.config import RecoverConfig
from compressllm.select.config import ChoiceConfig
from compressllm.stages.yamltext import parse_yaml

_BEFORE: Final = {"select", "teacher_tokens", "teacher_lr"}
_SHARED: Final = {
    "data", "mixture", "records", "record", "held_out", "seqlen", "batch_tokens", "micro_batch", "warmup", "betas",
    "weight_decay", "clip", "activation_checkpointing", "sharding", "save_every", "diverged", "dtype",
    "device",
}  # fmt: skip


class RecoverStageConfig(RecoverConfig):
    """Train a pruned model back towards its dense teacher, under its masks."""

    select: ChoiceConfig | None = None
    """Train on some of the records only, chosen beforehand: a method and a budget, as in paser:budget=0.1."""

    teacher_tokens: int | None = Field(default=None, ge=1)
    """Train the teacher on the same data first, on cross entropy alone and for so many tokens: text of a kind that it
    does not know, or writes otherwise, it teaches badly."""
    teacher_lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate of that."""

    @field_validator("select", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        try:
            return choice_of(value) if isinstance(value, str) else value
        except CompressError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _of_records(self) -> RecoverStageConfig:
        if self.select is None:
            return self
        name = split_spec(self.select.method, SELECTORS.kind)[0]
        if not self.records:
            raise ValueError(f"select: {name} chooses among records; give records, or train on text without select")
        if build(SELECTORS, self.select.method).needs_student and self.teacher is None:
            raise ValueError(f"select: {name} compares the pruned model with the dense one; give that as teacher")
        return self

    @model_validator(mode="after")
    def _with_teacher(self) -> RecoverStageConfig:
        if self.teacher_tokens is not None and self.teacher is None:
            raise ValueError("teacher_tokens: there is no teacher to train; give one, or leave them out")
        return self

    def training(self, **changes: Any) -> RecoverConfig:
        """The settings of the training alone, some of them changed."""
        return RecoverConfig.model_validate({**self.model_dump(exclude=_BEFORE), **changes})

    def correction(self, training: RecoverConfig) -> RecoverConfig:
        """The settings of the teacher's training: those of the student's, as far as they say how to train."""
        kept = training.model_dump(include=_SHARED)
        return RecoverConfig.model_validate(
            {
                **kept,
                "losses": "ce=1.0",
                "masking": "none",
                "max_tokens": self.teacher_tokens,
                "lr": self.teacher_lr,
                "evaluate_every": 0.5,
            }
        )


def choice_of(text: str) -> Mapping[str, Any]:
    """A choice as a flag spells it: ``paser``, ``paser:budget=0.1``, or the YAML mapping ``{method: …, budget: …}``.

    Raises: RecipeError.
    """
    if text.lstrip().startswith("{"):
        fields = parse_yaml(text, "select")[0]
        if not isinstance(fields, Mapping):
            raise RecipeError(f"select: {text!r} is no mapping; write {{method: paser, budget: 0.1}}")
        return fields
    name, _, settings = text.partition(":")
    fields = {"method": name.strip()}
    for pair in filter(None, settings.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"select: {pair!r} has no value; write {name}:budget=0.1")
        fields[key.strip()] = parse_yaml(value, "select")[0]
    return fields
