"""Recipes of llm-compressor in all their forms, and what is said of what has no equal."""

from pathlib import Path
from typing import Any

import pytest

from compressllm.core.errors import RecipeError
from compressllm.core.pattern import NM, Unstructured
from compressllm.stages.llmcompressor import Converted, convert_recipe
from compressllm.stages.recipe import read_recipe


@pytest.fixture
def convert(tmp_path: Path):
    """``convert(yaml)``: what becomes of it."""

    def of(text: str) -> Converted:
        (tmp_path / "theirs.yaml").write_text(text)
        return convert_recipe(tmp_path / "theirs.yaml", "org/model")

    return of


THREE_STAGES = """\
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      block_size: 128
      dampening_frac: 0.001
      sequential_update: true
      targets: ["Linear"]
      ignore: ["re:.*lm_head", 're:.*layers\\.0\\.mlp\\.down_proj$']
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier:
      targets: ['re:.*q_proj.weight']
      start: 0
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      config_groups:
        group_0:
          weights: {num_bits: 4, type: "int", symmetric: true, strategy: "group", group_size: 128}
          targets: ["Linear"]
"""


def test_three_stages(convert, tmp_path: Path) -> None:
    recipe, notes = convert(THREE_STAGES)
    (_, prune), (_, recover), (_, quantize) = recipe.steps()
    assert [name for name, _ in recipe.steps()] == ["prune", "recover", "quantize"]
    assert prune.method == {"sparsegpt": {"damping": 0.001}}
    assert prune.pattern == NM(2, 4)
    assert prune.skip == ("*layers.0.mlp.down_proj",)
    assert (recover.masking, recover.teacher) == ("fixed", None)
    assert (quantize.scheme, quantize.method, quantize.skip) == ("int4-g128", "gptq", ())
    assert len(notes) == 2  # of training, whose settings are elsewhere, and of calibration
    assert notes[0].startswith("finetuning_stage.finetuning_modifiers.ConstantPruningModifier: ")
    (tmp_path / "ours.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "ours.yaml") == recipe


def test_modern_form_with_a_preset(convert) -> None:
    recipe, notes = convert(
        "default_stage:\n  default_modifiers:\n"
        "    WandaPruningModifier: {sparsity: 0.6, mask_structure: '0:0', targets: [Linear]}\n"
        "    QuantizationModifier: {targets: [Linear], ignore: ['re:.*lm_head'], scheme: FP8_DYNAMIC}\n"
    )
    (_, prune), (_, quantize) = recipe.steps()
    assert (prune.method, prune.pattern) == ("wanda", Unstructured(0.6))
    assert (quantize.scheme, quantize.method) == ("fp8", "rtn")
    assert any("only weights are quantised" in note for note in notes)


def test_theirs_counts_what_goes(convert) -> None:
    assert convert(
        "a_stage: {x_modifiers: {SparseGPTModifier: {sparsity: 0.25, mask_structure: '1:4'}}}"
    ).recipe.steps()[0][1].pattern == NM(3, 4)


def test_owl_and_magnitude_and_some_linears(convert) -> None:
    owl = convert(
        "s_stage: {m_modifiers: {WandaPruningModifier: "
        "{sparsity: 0.7, sparsity_profile: owl, owl_m: 5, owl_lmbda: 0.08}}}"
    ).recipe.steps()
    assert owl[0][1].allocation == {"owl": {"threshold": 5.0, "spread": 0.08}}
    assert owl[-1][0] == "export"
    magnitude, notes = convert(
        "modifiers:\n  MagnitudePruningModifier:\n    init_sparsity: 0.05\n    final_sparsity: 0.8\n    start: 0\n"
        "    end: 5\n    targets: ['re:.*mlp', 'model.layers.1']\n"
    )
    config = magnitude.steps()[0][1]
    assert config.method == "magnitude"
    assert {glob: str(pattern) for glob, pattern in config.patterns.items()} == {
        "*mlp*": "0.8",
        "model.layers.1.*": "0.8",
        "*": "dense",
    }
    assert any("in one step" in note for note in notes)


def test_quantising_comes_last(convert) -> None:
    recipe, notes = convert(
        "t_stage:\n  o_modifiers:\n    GPTQModifier:\n      config_groups:\n        group_0:\n"
        "          weights: {num_bits: 8, type: int, strategy: channel}\n          targets: [Linear]\n"
        "    SparseGPTModifier: {sparsity: 0.5, percdamp: 0.01, targets: ['re:model.layers.\\d*$']}\n"
    )
    assert [name for name, _ in recipe.steps()] == ["prune", "quantize"]
    assert any(note.startswith("quantize: comes last") for note in notes)
    assert {str(pattern) for pattern in recipe.steps()[0][1].patterns.values()} == {"0.5", "dense"}
    assert "model.layers.*" in recipe.steps()[0][1].patterns


@pytest.mark.parametrize(
    ("modifier", "weights", "method"),
    [
        ("", "", "gptq"),
        ("      actorder: static\n", "", "gptq"),
        ("      actorder: null\n", "", {"gptq": {"order": "natural"}}),
        ("", ", actorder: group", "gptq"),
    ],
)
def test_order_of_columns(convert, modifier: str, weights: str, method: Any) -> None:
    recipe, notes = convert(
        "q_stage:\n  q_modifiers:\n    GPTQModifier:\n"
        + modifier
        + "      config_groups:\n        group_0:\n          weights: {num_bits: 4, type: int, strategy: group, "
        + f"group_size: 128{weights}}}\n          targets: [Linear]\n"
    )
    assert recipe.steps()[-1][1].method == method
    assert any("groups are of neighbours here" in note for note in notes) is bool(weights)


def test_what_has_no_equal_is_one_line_each(convert) -> None:
    recipe, notes = convert(
        "q_stage:\n  q_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n"
        "    WandaPruningModifier: {sparsity: 0.5, novelty: 1, ignore: ['re:.*(q|k)_proj']}\n"
        "    QuantizationModifier: {scheme: NVFP4, kv_cache_scheme: {num_bits: 8}}\n"
        "vars: 3\n"
    )
    assert [name for name, _ in recipe.steps()] == ["prune", "export"]
    for wanted in (
        "q_stage.q_modifiers.SmoothQuantModifier: has no equal",
        "WandaPruningModifier.novelty: has no equal",
        "re:.*(q|k)_proj cannot be written as a glob",
        "QuantizationModifier.scheme: NVFP4 has no equal",
        "vars: has no equal",
    ):
        assert sum(wanted in note for note in notes) == 1, (wanted, notes)
    assert all("\n" not in note for note in notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no stages"),
        ("a_stage: {x_modifiers: {SmoothQuantModifier: {}}}", "holds nothing that can be converted; a_stage.x_modif"),
        ("a_stage: {x_modifiers: {WandaPruningModifier: {sparsity: [0.1, 0.2]}}}", "one number is converted"),
        ("a_stage: {x_modifiers: {WandaPruningModifier: {sparsity: eval(s)}}}", "is computed from a variable"),
        ("a_stage: {x_modifiers: {WandaPruningModifier: {sparsity: 0.5, mask_structure: 'block_4,1'}}}", "no equal"),
        ("modifiers:\n  - !EpochRangeModifier {}\n", "is not YAML"),
    ],
)
def test_what_cannot_be_read_is_refused(convert, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        convert(text)
    assert "\n" not in str(caught.value)
