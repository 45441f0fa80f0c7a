"""Each selector against a slow, obvious version of it, and what calibration keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.contextual.attach import Contextual, prompt_through
from compressllm.contextual.calibrate import calibrate, calibration_path, find_calibration, load_calibration
from compressllm.contextual.calibrate import save_calibration as save
from compressllm.contextual.coarse import PromptMlp, kept_neurons
from compressllm.contextual.control import Mode
from compressllm.contextual.coreinfer import CoreInfer
from compressllm.contextual.fine import TokenMlp
from compressllm.contextual.griffin import Griffin
from compressllm.contextual.inputs import InputLinear
from compressllm.contextual.mlp import find_mlps
from compressllm.contextual.teal import left_out_of
from compressllm.contextual.topk import TopK
from compressllm.core.errors import CompressError
from compressllm.core.protocols import NEURON_SELECTORS, PromptScores
from compressllm.models.blocks import find_blocks

Attach = Callable[..., Contextual]


def test_griffin_scores_shares_of_tokens() -> None:
    h = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    h[2] = 0  # no neuron active: counts nothing
    slow = torch.zeros(10)
    for token in h:
        if token.norm() > 0:
            slow += (token / token.norm()) ** 2
    score = Griffin().score(h)
    torch.testing.assert_close(score, slow)
    scale = torch.rand(6, 1) + 0.1
    torch.testing.assert_close(Griffin().score(h * scale), score)
    order = torch.randperm(10)
    torch.testing.assert_close(Griffin().score(h[:, order]), score[order])


def test_coreinfer_counts_tokens_whose_core_has_a_neuron() -> None:
    h = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    h[3] = -h[3].abs()  # nothing positive: no core
    slow = torch.zeros(20)
    for token in h:
        positive = sorted((float(v) for v in token if v > 0), reverse=True)
        core = positive[: -(-4 * len(positive) // 10)]  # 40 %, rounded up
        slow += torch.tensor([float(v) in core for v in token])
    torch.testing.assert_close(CoreInfer().score(h), slow)


def test_coreinfer_goes_by_likeness_where_the_prompt_is_short(model: PreTrainedModel, windows: Tensor) -> None:
    fitted = calibrate(model, "coreinfer", windows)
    clusters = len(fitted["centroids"])
    assert clusters >= 2
    assert all(fitted[f"scores.{at}"].shape == (clusters, 48) for at in range(3))
    selector = CoreInfer()
    mine = [fitted[f"scores.{at}"][1] for at in range(3)]
    short = [PromptScores(score, score, 12) for score in mine]
    chosen = selector.choose(short, [24] * 3, fitted)
    assert all(torch.equal(one, fitted[f"scores.{at}"][1]) for at, one in enumerate(chosen)), "its own cluster"
    long = [PromptScores(score, 2 * score, 400) for score in mine]
    assert selector.choose(long, [24] * 3, fitted)[0] is long[0].total
    moving = [PromptScores(score.flip(0), 2 * score, 400) for score in mine]
    assert selector.choose(moving, [6] * 3, fitted)[0] is not moving[0].total


def test_top_k_takes_as_many_and_of_equal_ones_the_first() -> None:
    kept = TopK().keep(torch.tensor([[1.0, -3.0, 1.0, 0.5, 1.0]]), 0.6, "", {})
    assert kept.tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_cats_keeps_the_density_on_the_text_it_was_calibrated_on(
    density: float, model: PreTrainedModel, windows: Tensor, attached: Attach
) -> None:
    cats = attached("cats", density)
    kept: dict[str, list[Tensor]] = {}
    for runner in cats.runners:
        assert isinstance(runner, TokenMlp)
        seen = kept.setdefault(runner.mlp.name, [])
        runner.mlp.gate.module.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
    with torch.inference_mode():
        model(input_ids=windows, use_cache=False)
    for runner in cats.runners:
        assert isinstance(runner, TokenMlp)
        a = runner.mlp.act(torch.cat(kept[runner.mlp.name]).flatten(0, 1))
        share = NEURON_SELECTORS.get("cats")().keep(a, density, runner.mlp.name, cats.fitted).double().mean()
        assert float(share) == pytest.approx(density, abs=0.01)


def test_teal_splits_a_block_at_less_error_than_evenly(
    model: PreTrainedModel, windows: Tensor, attached: Attach
) -> None:
    fitted = calibrate(model, "teal", windows)
    sizes = {name: float(model.get_submodule(name).weight.numel()) for name in fitted if "proj" in name}  # type: ignore[union-attr, operator]
    blocks = {name: fitted[name] for name in fitted if name not in sizes}
    assert len(blocks) == 3
    for steps in blocks.values():
        assert (steps[1:] >= steps[:-1]).all(), "more is left out at every step"
        assert float(steps[-1, 0]) >= 0.9
    for density in (0.3, 0.5):
        greedy, even = left_out_of(density, fitted), left_out_of(density, fitted, "uniform")
        for block in blocks:
            mine = [name for name in sizes if name.startswith(f"{block}.")]
            for split in (greedy, even):
                read = sum(sizes[name] * (1 - split[name]) for name in mine) / sum(sizes[name] for name in mine)
                assert read == pytest.approx(density, abs=1e-5)
        errors = []
        for selector in ("teal", {"teal": {"allocation": "uniform"}}):
            contextual = Contextual(model, selector, density, fitted)
            block = contextual.blocks.modules[0]
            made: list[Tensor] = []
            handle = block.register_forward_hook(lambda module, args, out, made=made: made.append(out))
            for mode in (Mode.CHECK, Mode.DRAFT):
                with contextual.control.set(mode), torch.inference_mode():
                    model(input_ids=windows, use_cache=False)
            handle.remove()
            errors.append(float((made[1] - made[0])[:, -4:].norm(dim=-1).mean()))
            contextual.detach_()
        assert errors[0] <= errors[1]


def test_calibrations_come_back_and_others_are_refused(model: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    spec = {"cats": {}}
    fitted = calibrate(model, spec, windows)
    path = calibration_path(tmp_path, spec)
    assert find_calibration(tmp_path, "cats") == {}
    save(path, spec, fitted, {"source": "random"})
    again = load_calibration(path, "cats")
    assert again.keys() == fitted.keys()
    assert all(torch.equal(again[name], fitted[name]) for name in fitted)
    assert find_calibration(tmp_path, "cats").keys() == fitted.keys()
    teal = calibrate(model, "teal", windows)
    save(tmp_path / "teal", "teal", teal, {})
    assert left_out_of(0.4, load_calibration(tmp_path / "teal", "teal")) == left_out_of(0.4, teal)
    with pytest.raises(CompressError, match="was calibrated for"):
        load_calibration(path, "teal")
    (tmp_path / "broken").write_bytes(path.read_bytes()[:50])
    with pytest.raises(CompressError, match="cannot be read"):
        load_calibration(tmp_path / "broken", "cats")
    contextual = Contextual(model, "cats", 0.5, {"other": torch.zeros(1001)})
    with contextual.control.set(Mode.DRAFT), pytest.raises(CompressError, match=r"has no model\.layers\.0\.mlp"):
        model(input_ids=windows[:1, :1])


def test_gathered_neurons_compute_what_masked_ones_do(attached: Attach, prompt: Tensor) -> None:
    contextual = attached("griffin", 0.5)
    prompt_through(contextual, prompt)
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    for runner in contextual.runners:
        assert isinstance(runner, PromptMlp)
        assert runner.index is not None
        assert len(runner.index) == 32 or len(runner.index) == 24
        mask = torch.zeros(48, dtype=torch.float64)
        mask[runner.index] = 1
        right = runner.mlp.down(runner.mlp.activations(x)[1] * mask)
        torch.testing.assert_close(runner.draft(x), right)


@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("selector", ["topk", {"topk": {"by": "gate"}}, "cats", "teal"], ids=str)
def test_what_is_read_where_it_lies_is_what_masking_gives(
    selector: Any, tokens: int, attached: Attach, model: PreTrainedModel
) -> None:
    contextual = attached(selector, 0.4)
    for runner in contextual.runners:
        width = runner.mlp.hidden if isinstance(runner, TokenMlp) else runner._part.module.in_features  # type: ignore[attr-defined]
        x = torch.randn(tokens, width, dtype=torch.float64)
        if isinstance(runner, InputLinear):
            right = runner.dense(x * (x.abs() > runner.threshold))
        else:
            assert isinstance(runner, TokenMlp)
            a, h = runner.mlp.activations(x)
            chosen: Any = contextual.selector
            keep = chosen.keep(a if chosen.gated else h, 0.4, runner.mlp.name, contextual.fitted)
            right = runner.mlp.down(h * keep)
        torch.testing.assert_close(runner.draft(x), right)


def test_the_model_is_the_same_while_it_drafts_and_after(attached: Attach, model: PreTrainedModel) -> None:
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    for selector in NEURON_SELECTORS.names():
        contextual = attached(selector)
        for _ in range(2):  # attached, then detached
            now = model.state_dict()
            assert now.keys() == before.keys()
            for name, (place, value) in before.items():
                assert now[name].data_ptr() == place
                assert torch.equal(now[name], value)
            contextual.detach_()
    assert all("forward" not in vars(module) for module in model.modules())


def test_mlps_are_known_by_what_they_compute(model: PreTrainedModel) -> None:
    """Names say nothing: with gate and up swapped in name, the same one is found to be the gate."""
    right = [mlp.gate.module for mlp in find_mlps(find_blocks(model))]
    for block in model.model.layers:
        mlp = block.mlp
        gate, up = mlp.gate_proj, mlp.up_proj
        del mlp.gate_proj, mlp.up_proj
        mlp.up_proj, mlp.gate_proj = gate, up
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))
    assert [mlp.gate.module for mlp in find_mlps(find_blocks(model))] == right


@pytest.mark.parametrize(
    ("neurons", "density", "group", "kept"),
    [
        (1536, 0.5, 1, 768),
        (1536, 0.3, 1, 464),
        (1536, 0.3, 4, 464),
        (48, 0.5, 4, 32),
        (48, 0.01, 1, 16),
        (20, 0.5, 4, 8),
    ],
)
def test_how_many_neurons_a_density_keeps(neurons: int, density: float, group: int, kept: int) -> None:
    assert kept_neurons(neurons, density, group) == kept
