"""Statistics of a mixture's experts, against a loop over tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from compressllm.calibration.experts import tokens_needed
from compressllm.calibration.walker import Block, WalkOptions, walk_blocks
from compressllm.core.errors import CalibrationError
from compressllm.core.run import Run
from compressllm.core.stats import InputStats
from compressllm.models.bundle import Bundle
from compressllm.models.weights import LiveWeights
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model

NEEDS = frozenset({"mean", "var", "sqnorm", "hessian"})
EXPERTS = "model.layers.0.mlp.experts"
Seen = dict[str, list[Tensor]]


@pytest.fixture
def mixtral(build_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """One block of four experts, of which every token takes two."""
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return build_model(MixtralConfig(**size, **heads, num_local_experts=4, num_experts_per_tok=2))


@pytest.fixture
def many() -> Tensor:
    """(48, 16) token ids: 768 tokens, 384 to an expert if they were spread evenly."""
    return torch.randint(3, 64, (48, 16), generator=torch.Generator().manual_seed(1))


def collect(model: PreTrainedModel, windows: Tensor) -> dict[str, InputStats]:
    options = WalkOptions(batch_tokens=112)  # 7 windows at a time, the last batch of 6
    (block,) = walk_blocks(model, windows, LiveWeights(model), options)
    return block.collect(NEEDS)


def routed(model: PreTrainedModel, windows: Tensor) -> Seen:
    """What every expert's linears see, token by token, from one forward of the whole model."""
    experts, seen = model.get_submodule(EXPERTS), {}

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        for x, chosen in zip(args[0].double(), args[1].tolist(), strict=True):
            for expert in chosen:
                gate_up, down = f"{EXPERTS}.{expert}.gate_proj", f"{EXPERTS}.{expert}.down_proj"
                gate, up = experts.gate_up_proj[expert].double().chunk(2)
                seen.setdefault(gate_up, []).append(x)
                seen.setdefault(down, []).append(silu(gate @ x) * (up @ x))

    handle = experts.register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in windows.split(7):  # a router that chooses by place needs the same batches
            model(batch, use_cache=False)
    handle.remove()
    return seen


def assert_moments(stats: InputStats, rows: Tensor, weights: Tensor) -> None:
    """``stats`` are the moments of ``rows``, (n, in) float64, each counted ``weights``, (n,), times."""
    share = weights / weights.sum()
    mean, hessian = share @ rows, (rows * share[:, None]).T @ rows
    for found, expected in [
        (stats.mean, mean),
        (stats.hessian, hessian),
        (stats.sqnorm, hessian.diagonal()),
        (stats.var, share @ (rows - mean).square()),
    ]:
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_every_expert_has_the_statistics_of_its_own_tokens(mixtral: PreTrainedModel, many: Tensor) -> None:
    expected = routed(mixtral, many)
    stats = collect(mixtral, many)
    counts = [len(expected[f"{EXPERTS}.{expert}.gate_proj"]) for expert in range(4)]
    assert sum(counts) == 2 * many.numel()
    assert len(set(counts)) > 1
    assert max(counts) >= 256
    for expert, count in enumerate(counts):
        gate, up, down = (f"{EXPERTS}.{expert}.{part}_proj" for part in ("gate", "up", "down"))
        assert stats[gate] is stats[up]
        if count < 256:
            continue
        for name in (gate, down):
            assert (stats[name].tokens, stats[name].pooled) == (count, None)
            assert_moments(stats[name], torch.stack(expected[name]), torch.ones(count).double())


def starve(model: PreTrainedModel) -> None:
    """Every token of a batch goes to experts 0 and 3, but for two that go to 2 instead of 3; none goes to 1."""
    gate = model.model.layers[0].mlp.gate

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.tensor([[0, 3]]).repeat(len(hidden), 1)
        chosen[:2, 1] = 2
        return torch.zeros(len(hidden), 4), torch.full(chosen.shape, 0.5), chosen

    gate.forward = forward


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_with_few_tokens_is_filled_up_from_all(mixtral: PreTrainedModel, many: Tensor, part: str) -> None:
    starve(mixtral)
    expected, stats = routed(mixtral, many), collect(mixtral, many)
    source = part.replace("up", "gate")
    everyone = torch.stack([x for expert in range(4) for x in expected.get(f"{EXPERTS}.{expert}.{source}", [])])
    assert len(everyone) == 2 * many.numel()
    for expert, own in ((0, 768), (1, 0), (2, 14), (3, 754)):
        found = stats[f"{EXPERTS}.{expert}.{part}"]
        tokens = expected.get(f"{EXPERTS}.{expert}.{source}", [])
        assert len(tokens) == own
        lent = max(0, 256 - own)
        assert found.tokens == own + lent
        assert (found.pooled is None) == (own >= 256)
        rows = torch.stack([*tokens, *everyone])
        weights = torch.tensor([1.0] * own + [lent / len(everyone)] * len(everyone)).double()
        assert_moments(found, rows, weights)
    assert "no token reached this expert, 256 are needed: 256" in str(stats[f"{EXPERTS}.1.{part}"].pooled)
    assert "only 14 tokens reached this expert, 256 are needed: 242" in str(stats[f"{EXPERTS}.2.{part}"].pooled)


def test_no_more_is_lent_than_was_seen(mixtral: PreTrainedModel, many: Tensor) -> None:
    starve(mixtral)
    stats = collect(mixtral, many[:7])
    assert [stats[f"{EXPERTS}.{expert}.down_proj"].tokens for expert in range(4)] == [256, 224, 226, 256]


def test_wide_inputs_need_more_tokens() -> None:
    assert [tokens_needed(columns) for columns in (8, 2048, 4096, 14336)] == [256, 256, 512, 1792]


def test_filling_up_is_warned_of_and_noted(mixtral: PreTrainedModel, many: Tensor, tmp_path: Path) -> None:
    starve(mixtral)
    np.save(tmp_path / "ids.npy", many.numpy())
    run = Run()
    prune_model(Bundle(mixtral), PruneConfig(calibration={"source": str(tmp_path / "ids.npy")}), run)
    filled = {row["linear"]: row["fallback"] for row in run.records if "fallback" in row}
    assert list(filled) == [f"{EXPERTS}.{expert}.{part}_proj" for expert in (1, 2) for part in ("gate", "up", "down")]
    assert all("this expert" in reason for reason in filled.values())
    (warning,) = (one for one in run.warnings if "expert" in one)
    assert warning.startswith("model.layers.0: too few tokens reached the experts of 6 linears")
    assert {row["tokens"] for row in run.records if ".experts." in row["linear"]} >= {256}


def test_values_that_are_not_finite_name_the_expert(mixtral: PreTrainedModel, many: Tensor) -> None:
    starve(mixtral)
    mixtral.get_submodule(EXPERTS).gate_up_proj.data[2] = float("inf")
    with pytest.raises(CalibrationError, match=rf"{EXPERTS}\.2\.down_proj: input activations are not finite"):
        collect(mixtral, many)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_a_walk_computes_experts_eagerly_and_leaves_the_model_as_it_was(
    mixtral: PreTrainedModel, many: Tensor, implementation: str
) -> None:
    mixtral.set_experts_implementation(implementation)
    expected = collect(AutoModelForCausalLM.from_config(mixtral.config).eval(), many).keys()

    def used(block: Block) -> str:
        return str(block.module.mlp.experts.config._experts_implementation)

    walk = walk_blocks(mixtral, many, LiveWeights(mixtral))
    block = next(walk)
    assert used(block) == "eager"
    assert block.collect(NEEDS).keys() == expected
    walk.close()
    assert used(block) == implementation
    assert mixtral.config._experts_implementation == implementation
    assert not mixtral.get_submodule(EXPERTS)._forward_pre_hooks
