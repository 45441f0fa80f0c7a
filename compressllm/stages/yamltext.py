"""YAML as recipes need it: safe, YAML 1.2 numbers, no duplicate keys, bounded size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from compressllm.core.errors import RecipeError

_MAX_BYTES = 1 << 20
_MAX_NODES = 10_000
_MOST_DEEP = 32


class _Loader(yaml.SafeLoader):
    """SafeLoader with numbers as in YAML 1.2: in YAML 1.1, ``2:4`` is base 60 and reads as 124."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[-1] not in {"int", "float", "timestamp"}]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)

# YAML 1.1 also reads a leading zero as octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(str(node.value)))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(value: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The plain data in ``text``, and its syntax tree for line numbers.

    Args:
        where: What to call the text in messages.

    Raises: RecipeError if it is no YAML, names a key twice, or is larger or deeper than any recipe.
    """
    if len(text) > _MAX_BYTES:
        raise RecipeError(f"{where}: has {len(text)} characters; a recipe has at most {_MAX_BYTES}")
    try:
        root = yaml.compose(text, Loader=_Loader)
        _check(root, where)
        return yaml.load(text, Loader=_Loader), root  # a SafeLoader
    except RecursionError:
        raise RecipeError(f"{where}: is nested too deeply for a recipe") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{where}{line}: is not YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"
        ) from None
    except ValueError as error:  # a control character, an impossible number
        raise RecipeError(f"{where}: is not YAML: {error}") from None


def read_yaml(path: Path) -> tuple[Any, yaml.Node | None]:
    """As `parse_yaml`, from a file. Raises RecipeError also if it cannot be read."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path}: is {path.stat().st_size} bytes; a recipe has at most {_MAX_BYTES}")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text") from None


def line_of(node: yaml.Node | None, keys: tuple[int | str, ...]) -> int:
    """Line, from 1, of the nearest place in the syntax tree that ``keys`` lead to."""
    line = 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == str(key)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _check(root: yaml.Node | None, where: str) -> None:
    """Refuse keys given twice, deep nesting, and aliases that expand without bound."""
    count, todo = 0, [(root, 0)] if root else []
    while todo:
        node, depth = todo.pop()
        if depth > _MOST_DEEP:
            raise RecipeError(f"{where}:{node.start_mark.line + 1}: is nested too deeply for a recipe")
        count += 1
        if count > _MAX_NODES:
            raise RecipeError(f"{where}: has over {_MAX_NODES} entries once aliases are expanded; that is no recipe")
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if str(key.value) in seen:
                    raise RecipeError(f"{where}:{key.start_mark.line + 1}: key {key.value!r} is given twice")
                seen.add(str(key.value))
                todo += [(key, depth + 1), (value, depth + 1)]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(item, depth + 1) for item in node.value]
