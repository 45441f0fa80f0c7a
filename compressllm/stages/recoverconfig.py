"""Settings of the recover stage: those of the training, and of the choice of its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator, model_validator

from compressllm.core.errors import CompressError, RecipeError
from compressllm.core.protocols import SELECTORS
from compressllm.core.registry import build, split_spec
from compressllm.recover.config import RecoverConfig
from compressllm.select.config import ChoiceConfig
from compressllm.stages.yamltext import parse_yaml


class RecoverStageConfig(RecoverConfig):
    """Train a pruned model back towards its dense teacher, under its masks."""

    select: ChoiceConfig | None = None
    """Train on some of the records only, chosen beforehand: a method and a budget, as in paser:budget=0.1."""

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

    def training(self, **changes: Any) -> RecoverConfig:
        """The settings of the training alone, some of them changed."""
        return RecoverConfig.model_validate({**self.model_dump(exclude={"select"}), **changes})


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
