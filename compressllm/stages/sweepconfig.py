"""Settings of a sweep."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from compressllm.calibration.config import CalibrationConfig
from compressllm.core.config import Config, Pattern, method_of
from compressllm.core.errors import CompressError, PatternError
from compressllm.core.pattern import SparsityPattern, Unstructured, parse_pattern
from compressllm.core.protocols import ALLOCATORS, PRUNERS
from compressllm.core.registry import split_spec
from compressllm.eval.config import EvalConfig


def _points(value: Any) -> Any:
    """Read the text form of the points; drop the dense one, which is always measured, and those given twice."""
    try:
        given = parse_points(value) if isinstance(value, str) else [parse_pattern(_text(one)) for one in value]
    except CompressError as error:
        raise ValueError(str(error)) from None
    if not (points := tuple(dict.fromkeys(one for one in given if one.sparsity > 0))):
        raise ValueError("names no sparsity above 0; give some, as in 0.1:0.9:0.1 or 0.5,2:4")
    if grouped := [one for one in points if isinstance(one, Unstructured) and one.group]:
        raise ValueError(f"{grouped[0]}: give the fraction alone, and where scores compete as group")
    return points


def _text(value: Any) -> Any:
    return value if isinstance(value, SparsityPattern) else str(value)


class SweepConfig(Config):
    """Measure perplexity against sparsity."""

    points: Annotated[tuple[Pattern, ...], BeforeValidator(_points)] = Field(
        default="0:0.9:0.1",
        validate_default=True,
    )
    """Fractions removed, as FIRST:LAST:STEP or a list; N:M patterns may be among them. The dense model is always in."""
    method: method_of(PRUNERS) = "magnitude"  # type: ignore[valid-type]
    """How weights are chosen: a name from `compressllm list pruners`, or {name: {option: value}}."""
    group: Literal["row", "layer", "model"] | None = None
    """Where scores compete for a fraction; model, one threshold for all, is magnitude's default, and only for it."""
    allocation: method_of(ALLOCATORS) = "uniform"  # type: ignore[valid-type]
    """How a fraction is spread over the linears, if they do not compete: from `compressllm list allocators`."""
    skip: tuple[str, ...] = ()
    """Globs of linears to leave dense, as in '*.o_proj' or 'model.layers.0.*'."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text the method looks at, if it looks at any."""
    evaluation: EvalConfig = EvalConfig(backend="dense")
    """How each point is measured, and dtype and device of all. Every point computes alike: zeros are left in place."""
    rise: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """Relative rise of loss or perplexity up to which the curve counts as flat."""

    @property
    def resolved_group(self) -> str | None:
        """The group; the default filled in, or None for the method's own."""
        if self.group is None and self.allocation == "uniform" and self._is_magnitude:
            return "model"
        return self.group

    @property
    def _is_magnitude(self) -> bool:
        return split_spec(self.method, "pruner")[0] == "magnitude"

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.group == "model" and not self._is_magnitude:
            raise ValueError("group model is one threshold on magnitude; give method magnitude, or group row or layer")
        if self.group == "model" and self.allocation != "uniform":
            raise ValueError("group model leaves nothing to allocate; give group row or layer, or no allocation")
        return self


def parse_points(text: str) -> list[SparsityPattern]:
    """Read ``"0:0.9:0.1"`` (first, last, step; the last is in) or ``"0.3,2:4,4:8"``; both may be mixed.

    Raises: PatternError.
    """
    points: list[SparsityPattern] = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        ends = part.split(":")
        if len(ends) != 3:
            points.append(parse_pattern(part))
            continue
        first, last, step = (one.sparsity for one in map(parse_pattern, ends))
        count = math.floor((last - first) / step + 1e-9) if step > 0 else -1
        if not 0 <= count < 1000:
            raise PatternError(f"{part}: is no range of at most 1000 sparsities; give FIRST:LAST:STEP, as in 0:0.9:0.1")
        points += [Unstructured(round(first + index * step, 12)) for index in range(count + 1)]
    return points
