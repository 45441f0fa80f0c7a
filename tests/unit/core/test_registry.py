from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import REGISTRIES
from compressllm.core.registry import REGISTRY_OF, Registry, build, did_you_mean, split_spec


class Shape(Protocol):
    def area(self) -> float: ...


SHAPES: Registry[Shape] = Registry("shape", "compressllm.core")


@SHAPES.register("square")
@dataclass(frozen=True)
class Square:
    """A square.

    Args:
        side: Its side.
    """

    side: float = 1.0
    seed: int = 0


@SHAPES.register("frame")
@dataclass(frozen=True)
class Frame:
    """One shape around another."""

    inner: Shape
    width: int = 1

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError("width is negative")


@pytest.fixture(autouse=True)
def shape_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY_OF, Shape, SHAPES)


def test_a_method_is_named_or_given_options() -> None:
    assert build(SHAPES, "square") == Square()
    assert build(SHAPES, {"square": None}) == Square()
    assert build(SHAPES, {"square": {}}) == Square()
    assert build(SHAPES, {"square": {"side": 2}}) == Square(2.0)
    assert build(SHAPES, {"square": {"side": "2.5"}}) == Square(2.5)  # as a command line gives it


def test_an_option_typed_by_a_protocol_is_built_from_its_registry() -> None:
    assert build(SHAPES, {"frame": {"inner": "square"}}) == Frame(Square())
    assert build(SHAPES, {"frame": {"inner": {"square": {"side": 3}}, "width": 2}}) == Frame(Square(3.0), 2)
    with pytest.raises(RecipeError, match="unknown shape 'sqare'; did you mean 'square'"):
        build(SHAPES, {"frame": {"inner": "sqare"}})
    with pytest.raises(RecipeError, match="shape square: unknown option 'sid'; did you mean 'side'"):
        build(SHAPES, {"frame": {"inner": {"square": {"sid": 3}}}})


def test_defaults_reach_only_classes_that_have_the_option() -> None:
    assert build(SHAPES, "square", {"seed": 7, "colour": "red"}) == Square(seed=7)
    assert build(SHAPES, {"square": {"seed": 1}}, {"seed": 7}) == Square(seed=1)
    assert build(SHAPES, {"frame": {"inner": "square"}}, {"seed": 7}) == Frame(Square(seed=7))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sqare", "unknown shape 'sqare'; did you mean 'square'? Known: frame, square"),
        ("zzzzzz", "unknown shape 'zzzzzz'. Known: frame, square"),
        ({"square": {"sides": 3}}, "shape square: unknown option 'sides'; did you mean 'side'? Known: side, seed"),
        ({"square": {"side": "wide"}}, "shape square: option side='wide': "),
        ({"square": {"seed": 1.5}}, "shape square: option seed=1.5: "),
        ({"square": {"side": None}}, "shape square: option side=None: "),
        ("frame", "shape frame: option inner is needed"),
        ({"frame": {"width": 2}}, "shape frame: option inner is needed"),
        ({"frame": {"inner": "square", "width": -1}}, "shape frame: width is negative"),
        ({"frame": {"inner": 3}}, "shape: got 3; give its name, or {name: {option: value}}"),
        ({}, "shape: got {}; give its name"),
        ({"square": {}, "frame": {}}, "shape: got "),
        ({"square": 3}, "shape: got {'square': 3}; give its name"),
        ({3: {}}, "shape: got {3: {}}; give its name"),
        (["square"], "shape: got ['square']; give its name"),
        (None, "shape: got None; give its name"),
    ],
    ids=str,
)
def test_every_mistake_is_a_recipe_error_of_one_line(spec: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(SHAPES, spec)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_names_and_summaries() -> None:
    assert SHAPES.names() == ["frame", "square"]
    assert SHAPES.summary("square") == "A square."
    assert SHAPES.get("square") is Square


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="shape 'square' is registered twice"):
        SHAPES.register("square")(Frame)


def test_the_modules_of_the_package_are_imported_on_the_first_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "made_up_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text(
        "from dataclasses import dataclass\nimport builtins\n"
        "@builtins.MADE_UP.register('one')\n@dataclass\nclass One:\n    '''The one.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[object] = Registry("method", "made_up_methods")
    monkeypatch.setattr("builtins.MADE_UP", registry, raising=False)
    assert registry.names() == ["one"]
    assert registry.summary("one") == "The one."


def test_suggestions() -> None:
    assert did_you_mean("wnada", ["wanda", "random"]) == "; did you mean 'wanda'?"
    assert did_you_mean("xyz", ["wanda", "random"]) == "."
    assert split_spec({"wanda": {"a": 1}}, "pruner") == ("wanda", {"a": 1})


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_every_registered_method_says_in_one_line_what_it_does(kind: str) -> None:
    names = REGISTRIES[kind].names()
    assert names
    assert all(REGISTRIES[kind].summary(name).endswith(".") for name in names)
