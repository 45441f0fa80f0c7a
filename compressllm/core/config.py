"""Base of all configs: the same fields serve recipes, flags and the Python API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema

from compressllm.core.errors import CompressError
from compressllm.core.pattern import SparsityPattern, parse_pattern
from compressllm.core.registry import Registry, build

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


class Config(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _pattern(value: Any) -> Any:
    if isinstance(value, SparsityPattern):
        return value
    if isinstance(value, bool) or not isinstance(value, str | float | int):
        raise ValueError(f"{value!r} is no pattern; give N:M as in 2:4, or a fraction removed as in 0.5")
    try:
        return parse_pattern(str(value))
    except CompressError as error:
        raise ValueError(str(error)) from None


#: A sparsity pattern, written as `parse_pattern` reads it.
Pattern = Annotated[
    Any, BeforeValidator(_pattern), PlainSerializer(str), WithJsonSchema({"type": ["string", "number"]})
]


def _pattern_or_dense(value: Any) -> Any:
    return value if value == "dense" else _pattern(value)


#: A sparsity pattern, or ``dense``.
PatternOrDense = Annotated[
    Any, BeforeValidator(_pattern_or_dense), PlainSerializer(str), WithJsonSchema({"type": ["string", "number"]})
]


def name_in(registry: Registry[Any], *others: str) -> Any:
    """Annotation of a field that holds a name from ``registry``, or one of ``others``."""

    def check(name: str) -> str:
        try:
            if name not in others:
                registry.get(name)
        except CompressError as error:
            raise ValueError(str(error)) from None
        return name

    return Annotated[str, AfterValidator(check)]


def method_of(registry: Registry[Any]) -> Any:
    """Annotation of a field that names a method: checked against ``registry`` as soon as it is read."""

    def check(spec: Any) -> Any:
        try:
            build(registry, spec)
        except CompressError as error:
            raise ValueError(str(error)) from None
        return spec

    return Annotated[
        str | dict[str, dict[str, Any] | None],
        AfterValidator(check),
    ]
