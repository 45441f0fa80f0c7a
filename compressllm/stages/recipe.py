"""Recipes: a model, a seed and a list of stages, written in YAML."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, create_model, field_validator
from pydantic_core import ErrorDetails

from compressllm.core.config import Config
from compressllm.core.errors import RecipeError
from compressllm.core.registry import did_you_mean
from compressllm.stages.stage import STAGES
from compressllm.stages.yamltext import dump_yaml, line_of, parse_yaml, read_yaml

C = TypeVar("C", bound=Config)


def _stage_key(item: Any) -> str | None:
    if isinstance(item, Mapping) and len(item) == 1 and next(iter(item)) in STAGES:
        return str(next(iter(item)))
    if isinstance(item, Config):
        return next(iter(type(item).model_fields))
    return None


def _item_type(name: str, config: type[Config]) -> Any:
    model = create_model(f"{name.title()}Item", __base__=Config, **{name: (config, ...)})  # type: ignore[call-overload]
    return Annotated[model, Tag(name)]


_ITEMS = {name: _item_type(name, stage.config) for name, stage in STAGES.items()}
_AnyItem: Any = Annotated[
    Union[tuple(_ITEMS.values())],  # noqa: UP007
    Discriminator(
        _stage_key,
        custom_error_type="stage",
        custom_error_message="is not a stage: write one of " + ", ".join(STAGES) + ", with its settings below it",
    ),
]


class Family(Config):
    """A family of models that a recipe is meant for, by one of them, and what it costs there."""

    model: str = Field(min_length=1)
    """Hub id."""
    gpus: int = Field(default=1, ge=1)
    """GPUs that it needs at once."""
    gpu_hours: float = Field(gt=0)
    """Of H100s, all of them together."""
    gpu_gb: float = Field(gt=0)
    """Memory of each GPU that it fills, in decimal gigabytes."""
    measured: bool = False
    """Whether that was measured, or worked out as docs/recipes.md says."""


class Recipe(Config):
    """What to do to which model."""

    model: str = Field(min_length=1)
    """Hub id, folder, .gguf file, run folder, packed export, or demo."""
    seed: int = 0
    """The same seed gives the same masks, bit for bit."""
    description: str = ""
    """One line, shown by `compressllm recipe ls`."""
    families: dict[str, Family] = Field(default_factory=dict)
    """Other models it is meant for, by a short name that `compressllm run --model` takes."""
    stages: tuple[_AnyItem, ...]
    """Stages in order, each a single key with its settings."""

    @field_validator("stages", mode="before")
    @classmethod
    def _empty_settings(cls, value: Any) -> Any:
        """Read ``- eval:`` and ``- eval`` as a stage with its defaults."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            return value
        if not value:  # not min_length: that would also count stages dropped for mistakes of their own
            raise ValueError("is empty; give at least one stage")
        named = ({item: {}} if isinstance(item, str) else item for item in value)
        return [
            {key: {} if settings is None else settings for key, settings in item.items()}
            if isinstance(item, Mapping)
            else item
            for item in named
        ]

    def steps(self) -> list[tuple[str, Config]]:
        """Stage name and settings, in order."""
        return [(key := next(iter(type(item).model_fields)), getattr(item, key)) for item in self.stages]

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return dump_yaml(self.model_dump(mode="json", exclude=None if self.families else {"families"}))


def make_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data.

    Raises: RecipeError with every mistake in one line.
    """
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(error, None))) from None


def make_config(config: type[C], fields: Mapping[str, Any]) -> C:
    """One stage's settings from plain data.

    Raises: RecipeError with every mistake in one line.
    """
    try:
        return config.model_validate(fields)
    except ValidationError as error:
        raise RecipeError("; ".join(_sentence(one["loc"], one, one["msg"]) for one in error.errors())) from None


def method_spec(text: str | None) -> Any:
    """A method as a flag spells it: its name, or its YAML spec with options, ``{dsnot: {cycles: 50}}``.

    Raises: RecipeError.
    """
    return parse_yaml(text, "--method")[0] if text and text.lstrip().startswith("{") else text


def switch_or_mapping(text: str | None, flag: str) -> Any:
    """What a flag says that takes true, false or a YAML mapping of settings, ``{epochs: 2}``.

    Raises: RecipeError.
    """
    return parse_yaml(text, flag)[0] if text is not None else None


def read_recipe(path: Path, overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """A recipe from a YAML file.

    Args:
        model: In place of the recipe's own, wherever it names it: one of its ``families``, or any model.
        overrides: ``stages.0.prune.pattern=4:8`` and the like, put over what the file says.

    Raises: RecipeError with every mistake and its line.
    """
    fields, root = read_yaml(path)
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: holds {type(fields).__name__}, not a mapping with model and stages")
    if model is not None:
        family = (fields.pop("families", None) or {}).get(model, {})
        fields = _replaced(fields, fields.get("model"), family.get("model", model))
    for override in overrides:
        _override(fields, override)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}{line}" for line in _explain(error, root))) from None


def _replaced(value: Any, old: Any, new: str) -> Any:
    """The same data with another model in the place of the recipe's own."""
    if isinstance(value, Mapping):
        return {key: _replaced(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, old, new) for each in value]
    return new if value == old and isinstance(value, str) else value


def _override(fields: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text}: write PATH=VALUE, as in stages.0.prune.pattern=4:8")
    keys = path.split(".")
    at: Any = fields
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(at, list):
            if not key.isdigit() or int(key) >= len(at):
                raise RecipeError(
                    f"--set {text}: {'.'.join(keys[:depth])} has {len(at)} items, {key!r} is none of them"
                )
            index: Any = int(key)
        elif isinstance(at, dict):
            index = key
        else:
            raise RecipeError(f"--set {text}: {'.'.join(keys[:depth])} is a value and has nothing below it")
        if last:
            at[index] = parse_yaml(value, f"--set {text}")[0]
        else:
            if isinstance(at, list) and at[index] == keys[depth + 1]:
                at[index] = {at[index]: {}}  # a stage written without settings
            if isinstance(at, dict) and at.get(index) is None:
                at[index] = {}
            at = at[index]


def _explain(error: ValidationError, root: yaml.Node | None) -> list[str]:
    """One sentence a mistake: ``:line: where: what``, or without the line if there is no YAML."""
    lines = []
    for one in error.errors():
        loc = _without_tags(one["loc"])
        message = one["msg"]
        if one["type"] == "extra_forbidden":
            known = _fields_at(loc[:-1])
            message = f"unknown key{did_you_mean(str(loc[-1]), known)} Known: {', '.join(known)}"
        elif one["type"] == "stage":
            given = one["input"]
            key = next(iter(given)) if isinstance(given, Mapping) and len(given) == 1 else None
            message = f"{key or given!r} {message}{did_you_mean(str(key), STAGES) if key else ''}"
        lines.append((f":{line_of(root, loc)}: " if root else "") + _sentence(loc, one, message))
    return lines


def _sentence(loc: tuple[int | str, ...], error: ErrorDetails, message: str) -> str:
    plain = isinstance(error["input"], str | int | float) and error["type"] not in {"extra_forbidden", "stage"}
    if plain and not message.startswith("Value error, "):  # our own messages say what came
        message += f", not {error['input']!r}"
    message = message.removeprefix("Value error, ")
    if message[:1].isupper() and message[1:2].islower():
        message = message[0].lower() + message[1:]
    return f"{'.'.join(map(str, loc)) or 'recipe'}: {message}"


def _without_tags(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Drop the discriminator's tag: ``stages.0.prune.prune.pattern`` is ``stages.0.prune.pattern``."""
    if len(loc) > 3 and loc[0] == "stages" and loc[2] == loc[3]:
        return (*loc[:2], *loc[3:])
    return loc


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a place in a recipe."""
    at: Any = Recipe
    for part in loc:
        if at is Recipe and part == "stages":
            at = STAGES
        elif at is STAGES:
            at = STAGES[part].config if part in STAGES else STAGES
        else:
            at = _config_in(at.model_fields[part].annotation)
    return list(at if at is STAGES else at.model_fields)


def _config_in(annotation: Any) -> type[Config]:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if isinstance(kind, type) and issubclass(kind, Config))
    return annotation  # type: ignore[no-any-return]
