import pytest
from transformers import PreTrainedModel

from compressllm.core.errors import PatternError, RecipeError
from compressllm.core.pattern import NM, Unstructured
from compressllm.models.blocks import all_linears
from compressllm.prune.plan import make_plan


def test_without_globs_every_linear_gets_the_pattern(llama: PreTrainedModel) -> None:
    plan = make_plan(llama, NM(2, 4), (), "row")
    assert list(plan) == list(all_linears(llama))
    assert set(plan.values()) == {NM(2, 4)}


def test_skipped_linears_are_absent(llama: PreTrainedModel) -> None:
    plan = make_plan(llama, NM(2, 4), ("*.o_proj", "model.layers.1.*", "*.0.mlp.[gu]*_proj"), "row")
    assert list(plan) == [
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.2.self_attn.{name}_proj" for name in "qkv"),
        *(f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]


@pytest.mark.parametrize("glob", ["*.out_proj", "o_proj", "layers.0.*", "*.O_PROJ", ""])
def test_a_glob_that_matches_nothing_is_an_error(llama: PreTrainedModel, glob: str) -> None:
    with pytest.raises(RecipeError, match=r"matches no linear; names look like model\.layers\.0\.self_attn\.q_proj"):
        make_plan(llama, NM(2, 4), ("*.o_proj", glob), "row")


def test_leaving_nothing_to_prune_is_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match="leaves no linear to prune"):
        make_plan(llama, NM(2, 4), ("*",), "row")


def test_the_first_linear_that_cannot_take_the_pattern_is_named(llama: PreTrainedModel) -> None:
    message = (
        r"^model\.layers\.0\.mlp\.down_proj: 48 inputs are not a multiple of 32, as 16:32 needs; name it under skip"
    )
    with pytest.raises(PatternError, match=message):
        make_plan(llama, NM(16, 32), (), "row")
    plan = make_plan(llama, NM(16, 32), ("*.down_proj",), "row")
    assert len(plan) == 18


@pytest.mark.parametrize("group", ["row", "layer"])
def test_the_methods_group_fills_in_what_the_pattern_leaves_open(llama: PreTrainedModel, group: str) -> None:
    assert set(make_plan(llama, Unstructured(0.5), (), group).values()) == {Unstructured(0.5, group)}
    assert set(make_plan(llama, Unstructured(0.5, "row"), (), group).values()) == {Unstructured(0.5, "row")}
