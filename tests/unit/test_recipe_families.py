"""Recipes for families of models: each on a tiny model of the family's architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from compressllm.models.facts import read_facts
from compressllm.stages.recipe import Recipe, make_recipe, read_recipe
from compressllm.stages.runner import check_recipe, run_recipe
from compressllm.stages.shipped import shipped_recipes

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama3": lambda: LlamaConfig(**SHAPE, rope_theta=5e5),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True
    ),
    "smollm2": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
}
RECIPES = {name: path for name, path in shipped_recipes().items() if read_recipe(path).families}
RUN = [("best-one-shot-2of4", "gemma3"), ("recover-2of4", "qwen3"), ("throughput-int4-2of4", "mistral")]


@pytest.fixture
def small(build_model: Callable, tmp_path: Path) -> Callable[[str, str], Recipe]:
    """``small(recipe, family)``: the recipe as it is, but for the model and the text, which are tiny and local."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 64, (24, 16)))

    def made(name: str, family: str) -> Recipe:
        folder = tmp_path / family
        build_model(FAMILIES[family]()).save_pretrained(folder)
        recipe = read_recipe(RECIPES[name], model=str(folder)).model_dump(mode="json")
        for stage in recipe["stages"]:
            ((kind, settings),) = stage.items()
            if kind == "eval":
                settings |= {"source": str(ids), "seqlen": None}
            if "calibration" in settings:
                settings["calibration"] = {"source": str(ids)}
            if kind == "recover":
                settings |= {"data": [str(ids)], "seqlen": 16, "max_tokens": 64, "batch_tokens": 32}
        return make_recipe(recipe)

    return made


def test_every_goal_has_every_family() -> None:
    assert len(RECIPES) == 3
    assert all(read_recipe(path).families.keys() == FAMILIES.keys() for path in RECIPES.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_finds_nothing_wrong(small: Callable, name: str, family: str) -> None:
    recipe = small(name, family)
    lines = check_recipe(recipe)
    assert len(lines) == 1 + len(recipe.stages) + 1  # the model, and the disk space all of it takes
    assert any("14 linears to 2:4" in line for line in lines)


@pytest.mark.parametrize(("name", "family"), RUN)
def test_a_run_ends_in_a_packed_model(small: Callable, name: str, family: str, tmp_path: Path) -> None:
    manifest = run_recipe(small(name, family), tmp_path / "out")
    facts = read_facts(tmp_path / "out" / "model")
    assert facts.format == "packed"
    assert {str(pattern) for pattern in facts.patterns.values()} == {"2:4"}
    assert len(facts.linears) == 14
    assert bool(facts.schemes) == name.startswith("throughput")
    assert "perplexity" in manifest["stages"][-1]["metrics"]


def test_a_family_takes_the_place_of_the_model_wherever_it_is_named() -> None:
    recipe = read_recipe(RECIPES["recover-2of4"], model="qwen3")
    teacher = next(config.teacher for name, config in recipe.steps() if name == "recover")
    assert recipe.model == teacher == yaml.safe_load(RECIPES["recover-2of4"].read_text())["families"]["qwen3"]["model"]
    assert not recipe.families
    other: Any = read_recipe(RECIPES["recover-2of4"], ["stages.2.recover.teacher=bigger"], model="org/mine")
    assert (other.model, other.steps()[2][1].teacher) == ("org/mine", "bigger")


def test_costs_are_those_worked_out() -> None:
    """Of the largest and the smallest, as benchmarks/recipe_cost.py prints them."""
    import runpy

    cost = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "recipe_cost.py"))
    hours = {"best-one-shot-2of4": "one_shot", "recover-2of4": "recovery", "throughput-int4-2of4": "throughput"}
    for name, path in RECIPES.items():
        for family, told in read_recipe(path).families.items():
            assert told.gpu_hours == pytest.approx(cost[hours[name]](cost["MODELS"][family]), abs=0.006), (name, family)
            assert not told.measured
