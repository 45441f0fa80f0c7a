"""Recipes: YAML in, settings out, and what is said when it is wrong."""

import json
from pathlib import Path

import pytest

import compressllm
from compressllm.core.errors import RecipeError
from compressllm.core.pattern import NM, Unstructured
from compressllm.stages.recipe import Recipe, make_recipe, read_recipe
from compressllm.stages.stage import STAGES

RECIPES = sorted((Path(compressllm.__file__).parent.parent / "recipes").glob("*.yaml"))

PLAIN = """\
model: demo
stages:
  - prune:
      pattern: 2:4
  - eval: {windows: 8}
"""


@pytest.fixture
def write(tmp_path: Path):
    """Writes YAML to a file and gives its path."""

    def to_file(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def mistakes(path: Path, *overrides: str) -> list[str]:
    """What `read_recipe` complains of, one mistake an item, the file's name cut off."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    return [line.removeprefix(str(path)) for line in str(caught.value).splitlines()]


def test_there_are_recipes() -> None:
    assert "demo" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.description, "`compressllm recipe ls` shows it"
    assert recipe.steps()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_survives_a_round_trip(path: Path, write) -> None:
    recipe = read_recipe(path)
    again = read_recipe(write(recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize(
    "text",
    [
        *("2:4", "yes", "null", "0.5", "12_000", "2026-01-01", "a: b # c", "é\nü", "-", ""),
        # Numbers to YAML 1.2, which we read, and none to YAML 1.1, which PyYAML writes.
        *("1e3", "08", "+.5"),
    ],
)
def test_any_text_survives_a_round_trip(text: str, write) -> None:
    recipe = make_recipe({"model": "demo", "description": text, "stages": ["eval"]})
    assert read_recipe(write(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2:4", NM(2, 4)),
        ("20:40", NM(20, 40)),  # both base 60 in YAML 1.1: 124 and 1240
        ("'2:4'", NM(2, 4)),
        ("0.5", Unstructured(0.5)),
        (".5", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        ("0.5/row", Unstructured(0.5, "row")),
        ("1", Unstructured(1.0)),
    ],
)
def test_pattern_needs_no_quotes(written: str, meant: object, write) -> None:
    recipe = read_recipe(write(PLAIN.replace("2:4", written)))
    assert recipe.steps()[0][1].pattern == meant


@pytest.mark.parametrize(("written", "meant"), [("7", 7), ("-7", -7), ("010", 10)])
def test_numbers_are_decimal(written: str, meant: int, write) -> None:
    assert read_recipe(write(f"seed: {written}\n{PLAIN}")).seed == meant


@pytest.mark.parametrize("item", ["eval", "{eval: }", "{eval: {}}", "{eval: null}"])
def test_a_stage_may_go_without_settings(item: str, write) -> None:
    recipe = read_recipe(write(f"model: demo\nstages:\n  - {item}\n"))
    assert recipe.steps() == [("eval", STAGES["eval"].config())]


@pytest.mark.parametrize(
    ("key", "line", "where", "meant"),
    [
        ("sed: 1", 2, "sed", "seed"),
        ("stages:\n  - evl: {}", 3, "stages.0", "eval"),
        ("stages:\n  - prune:\n      method: wanda\n      patern: 2:4", 5, "stages.0.prune.patern", "pattern"),
        (
            "stages:\n  - prune:\n      calibration:\n        sampels: 8",
            5,
            "stages.0.prune.calibration.sampels",
            "samples",
        ),
        ("stages:\n  - prune:\n      method: wnada", 4, "stages.0.prune.method", "wanda"),
        ("stages:\n  - prune: {method: {random: {sed: 1}}}", 3, "stages.0.prune.method", "seed"),
        ("stages:\n  - export: {format: paked}", 3, "stages.0.export.format", "packed"),
        ("stages:\n  - eval: {}\n  - eval:\n      window: 8", 5, "stages.1.eval.window", "windows"),
    ],
)
def test_a_wrong_word_gets_its_line_and_a_suggestion(key: str, line: int, where: str, meant: str, write) -> None:
    found = mistakes(write(f"model: demo\n{key}\n"))
    mine = [text for text in found if text.startswith(f":{line}: {where}: ")]
    assert mine, found
    assert f"did you mean {meant!r}?" in mine[0]


ALL_WRONG = """\
sed: 1
stages:
  - prune:
      patern: 2:4
      method: wnada
      calibration:
        samples: 0
        seqlen: long
  - prune: {pattern: "3:2"}
  - evl:
  - eval: {windows: 4}
"""


def test_every_mistake_is_told_at_once(write) -> None:
    found = mistakes(write(ALL_WRONG))
    wanted = {
        ":1: model: ",
        ":1: sed: ",
        ":4: stages.0.prune.patern: ",
        ":5: stages.0.prune.method: ",
        ":7: stages.0.prune.calibration.samples: ",
        ":8: stages.0.prune.calibration.seqlen: ",
        ":9: stages.1.prune.pattern: ",
        ":10: stages.2: ",
    }
    assert {start for start in wanted if any(text.startswith(start) for text in found)} == wanted
    assert len(found) == len(wanted), found


def test_mistakes_made_without_a_file_fit_one_line() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"model": "demo", "sed": 1, "stages": [{"prune": {"patern": "2:4"}}, "eval"]})
    message = str(caught.value)
    assert "\n" not in message
    assert "seed" in message
    assert "stages.0.prune.patern" in message


def test_no_mistake_is_invented_when_every_stage_is_wrong(write) -> None:
    found = mistakes(write("model: demo\nstages:\n  - prune: {patern: 2:4}\n"))
    assert len(found) == 1, found


@pytest.mark.parametrize(
    "value",
    ["[2, 4]", "null", "true", "{n: 2}", "3:2", "0:4", "two", "150%", "-0.5", ".nan"],
)
def test_what_is_no_pattern_is_refused(value: str, write) -> None:
    found = mistakes(write(PLAIN.replace("2:4", value)))
    assert any(text.startswith(":4: stages.0.prune.pattern: ") for text in found), found


def test_a_stage_item_has_one_key(write) -> None:
    found = mistakes(write("model: demo\nstages:\n  - eval: {}\n  - prune: {}\n    eval: {}\n"))
    assert found[0].startswith(":4: stages.1: "), found


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("model: demo\nseed: 1\nmodel: other\nstages: [eval]\n", 3, "model"),
        ("model: demo\nstages:\n  - prune:\n      pattern: 2:4\n      pattern: 4:8\n", 5, "pattern"),
        ("model: demo\nstages:\n  - eval: {windows: 1, windows: 2}\n", 3, "windows"),
    ],
)
def test_a_key_given_twice_is_refused(text: str, line: int, key: str, write) -> None:
    found = mistakes(write(text))
    assert found == [f":{line}: key {key!r} is given twice"]


def test_aliases_may_be_used(write) -> None:
    recipe = read_recipe(write("model: demo\nstages:\n  - eval: &how {windows: 3}\n  - prune\n  - eval: *how\n"))
    assert recipe.steps()[2] == recipe.steps()[0]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))]),
        "&loop [*loop]",
        "model: demo\nstages: &loop\n  - eval: *loop\n",
        "model: " + "x" * (1 << 20),
        "[" * 2_000,
    ],
    ids=["bomb", "loop", "loop-inside", "large", "deep"],
)
def test_what_would_eat_the_machine_is_refused(text: str, write) -> None:
    assert len(mistakes(write(text))) == 1


@pytest.mark.parametrize(
    "text",
    ["", "- eval\n", "model: [\n", "model: \x07\n", "model: !!python/name:os.system\n"],
)
def test_what_is_no_recipe_is_refused(text: str, write) -> None:
    assert len(mistakes(write(text))) == 1


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    for name in ("none.yaml", "latin.yaml", "."):
        assert len(mistakes(tmp_path / name)) == 1


def test_set_goes_over_the_file(write) -> None:
    recipe = read_recipe(
        write(PLAIN), ["stages.0.prune.pattern=4:8", "seed=7", "stages.0.prune.calibration.samples=3", "model=other"]
    )
    (_, prune), (_, evaluate) = recipe.steps()
    assert (recipe.model, recipe.seed) == ("other", 7)
    assert (prune.pattern, prune.calibration.samples) == (NM(4, 8), 3)
    assert evaluate.windows == 8


def test_set_reaches_into_a_stage_without_settings(write) -> None:
    recipe = read_recipe(write("model: demo\nstages: [eval]\n"), ["stages.0.eval.windows=3"])
    assert recipe.steps()[0][1].windows == 3


def test_set_reads_values_as_yaml(write) -> None:
    recipe = read_recipe(write(PLAIN), ["stages.0.prune={method: {random: {seed: 5}}, skip: ['*.o_proj']}"])
    config = recipe.steps()[0][1]
    assert config.method == {"random": {"seed": 5}}
    assert config.skip == ("*.o_proj",)


@pytest.mark.parametrize(
    "override",
    [
        "seed",
        "stages.2.eval.windows=3",
        "stages.x.eval.windows=3",
        "stages.0.prune.patern=2:4",
        "stages.0.prune.pattern=3:2",
        "seed=[",
        "seed.more.still=1",
    ],
)
def test_a_wrong_override_is_refused(override: str, write) -> None:
    assert len(mistakes(write(PLAIN), override)) == 1


def test_schema_is_json_and_names_every_stage() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert {"model", "seed", "stages"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    text = json.dumps(schema["properties"]["stages"])
    assert STAGES
    for name, stage in STAGES.items():
        items = [key for key, model in schema["$defs"].items() if set(model["properties"]) == {name}]
        assert any(f'"#/$defs/{key}"' in text for key in items), f"no stage item {name} in the schema"
        fields = schema["$defs"][stage.config.__name__]["properties"]
        assert fields.keys() == stage.config.model_fields.keys()
        assert all("description" in field for field in fields.values()), f"a field of {name} has no docstring"
