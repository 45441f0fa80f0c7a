"""Registries: a method is one decorated class in one file, found by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, get_type_hints

from compressllm.core.errors import RecipeError

T = TypeVar("T")
C = TypeVar("C", bound=type)

#: How a method is named in a recipe: its name, or ``{name: {option: value}}``.
Spec = str | Mapping[str, Mapping[str, Any] | None]


class Registry(Generic[T]):
    """Names of one kind of method.

    The modules of ``package`` are imported on the first look-up, so that defining a
    method is the whole of adding it, and that no import cycle can arise.

    Args:
        kind: What one entry is called in messages, for example ``"pruner"``.
        package: The package whose modules register entries.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, type] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that files the class under ``name``."""

        def add(cls: C) -> C:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> type:
        """The class filed under ``name``.

        Raises: RecipeError with the nearest known name.
        """
        self._load()
        if name not in self._entries:
            raise RecipeError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self._entries)} Known: {', '.join(self.names())}"
            )
        return self._entries[name]

    def summary(self, name: str) -> str:
        """First line of the class's docstring, shown by ``compressllm list``."""
        return (self.get(name).__doc__ or "").strip().splitlines()[0]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before, since the modules may look each other up
        try:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
                importlib.import_module(module.name)
        except BaseException:
            self._loaded = False
            raise


#: protocol class -> the registry that holds its implementations
REGISTRY_OF: dict[type, Registry[Any]] = {}


def did_you_mean(wrong: str, known: Any) -> str:
    """``"; did you mean 'x'?"``, or ``"."`` when nothing is near."""
    near = difflib.get_close_matches(wrong, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def split_spec(spec: Spec, kind: str) -> tuple[str, dict[str, Any]]:
    """Split a method spec into its name and options.

    Raises: RecipeError if it is neither a name nor a mapping of one name to options.
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, options),) = spec.items()
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, dict(options or {})
    raise RecipeError(f"{kind}: got {spec!r}; give its name, or {{name: {{option: value}}}}")


def build(registry: Registry[T], spec: Spec, defaults: Mapping[str, Any] | None = None) -> T:
    """Make the method that ``spec`` names, its options checked against the class's fields.

    An option typed by a protocol (a refiner's initial pruner, say) takes a spec of its own and is
    built from that protocol's registry.

    Args:
        defaults: Options for classes that have them, used where ``spec`` is silent: the recipe's seed, say.

    Raises: RecipeError for an unknown name or option, or a value of the wrong type.
    """
    name, options = split_spec(spec, registry.kind)
    cls = registry.get(name)
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    made: dict[str, Any] = {key: value for key, value in (defaults or {}).items() if key in fields}
    for key, value in options.items():
        where = f"{registry.kind} {name}"
        if key not in fields:
            raise RecipeError(
                f"{where}: unknown option {key!r}{did_you_mean(key, fields)} Known: {', '.join(fields) or 'none'}"
            )
        hint = hints[key]
        if isinstance(hint, type) and hint in REGISTRY_OF:
            made[key] = build(REGISTRY_OF[hint], value, defaults)
            continue
        made[key] = _checked(value, hint, f"{where}: option {key}={value!r}")
    try:
        return cls(**made)  # type: ignore[no-any-return]
    except TypeError:
        missing = [
            f.name
            for f in fields.values()
            if f.name not in made and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if not missing:
            raise  # the class's own fault
        raise RecipeError(f"{registry.kind} {name}: option {', '.join(missing)} is needed") from None
    except ValueError as error:
        raise RecipeError(f"{registry.kind} {name}: {error}") from None


def _checked(value: Any, hint: Any, option: str) -> Any:
    from pydantic import TypeAdapter, ValidationError  # not above: kernels are to run where it is not installed

    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise RecipeError(f"{option}: {error.errors()[0]['msg']}") from None
