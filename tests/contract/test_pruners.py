"""What every pruner promises, whatever it does: run over the registry."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from compressllm.core.masks import raw
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.registry import build
from compressllm.core.stats import InputStats, StatsAccumulator

STATISTICS = ("mean", "var", "sqnorm", "hessian")
PATTERNS = [NM(2, 4), NM(4, 8), NM(1, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")]
OUT, COLUMNS, TOKENS = 24, 48, 96


class Layer(NamedTuple):
    weight: Tensor
    stats: InputStats


@pytest.fixture(params=["bfloat16", "dead", "tied", "zero", "negative"])
def awkward_layer(request: pytest.FixtureRequest) -> Layer:
    """bfloat16 weights; with a dead input, with tied values, with an all-zero row, all negative with -0.0."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, COLUMNS, generator=generator).bfloat16().float()
    x = torch.randn(TOKENS, COLUMNS, generator=generator) + 0.5
    if request.param == "dead":
        x[:, 5:9] = 0.0
    if request.param == "tied":
        weight, x = weight.sign() * 0.25, torch.ones_like(x)
    if request.param == "zero":
        weight[3], weight[:, 7] = 0.0, 0.0
    if request.param == "negative":
        weight = -weight.abs()
        weight[:, ::3] = -0.0
    stats = StatsAccumulator(frozenset(STATISTICS))
    stats.add_(x)
    return Layer(weight, stats.finish("layer"))


def allowed(pattern: SparsityPattern) -> int:
    """How many of all weights stay."""
    return round(OUT * COLUMNS * (1 - pattern.sparsity))


def same(one: Pruned, other: Pruned) -> bool:
    return torch.equal(one.keep, other.keep) and torch.equal(raw(one.weight), raw(other.weight))


def test_there_are_pruners() -> None:
    assert {"random", "magnitude", "wanda"} <= set(PRUNERS.names())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", PRUNERS.names())
def test_pruner_keeps_its_contract(name: str, pattern: SparsityPattern, awkward_layer: Layer) -> None:
    once, again = (build(PRUNERS, name).prune(*awkward_layer, pattern) for _ in range(2))
    assert once.keep.dtype == torch.bool
    assert once.weight.dtype == torch.float32
    assert once.keep.shape == once.weight.shape == awkward_layer.weight.shape
    assert pattern.violations(once.keep) == 0
    assert int(once.keep.sum()) == allowed(pattern)
    assert not raw(once.weight)[~once.keep].any()  # +0.0 and not -0.0
    assert once.weight.isfinite().all()
    assert same(once, again)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", PRUNERS.names())
def test_arguments_are_left_as_they_were(name: str, pattern: SparsityPattern, awkward_layer: Layer) -> None:
    weight, stats = awkward_layer
    before = raw(weight).clone(), {key: stats.need(key).clone() for key in STATISTICS}
    pruned = build(PRUNERS, name).prune(weight, stats, pattern)
    pruned.weight.fill_(7.0)  # the result is no view of an argument either
    assert torch.equal(raw(weight), before[0])
    assert all(torch.equal(stats.need(key), before[1][key]) for key in STATISTICS)


@pytest.mark.parametrize("name", PRUNERS.names())
def test_needs_name_every_statistic_that_is_read(name: str, awkward_layer: Layer) -> None:
    pruner = build(PRUNERS, name)
    assert pruner.needs <= set(STATISTICS)
    assert pruner.group in {"row", "layer"}
    weight, stats = awkward_layer
    needed = replace(stats, **{key: None for key in STATISTICS if key not in pruner.needs})
    assert same(pruner.prune(weight, needed, NM(2, 4)), pruner.prune(weight, stats, NM(2, 4)))


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("name", PRUNERS.names())
def test_nothing_or_everything_can_be_removed(name: str, group: str, awkward_layer: Layer) -> None:
    pruner = build(PRUNERS, name)
    whole = pruner.prune(*awkward_layer, Unstructured(0.0, group))
    assert whole.keep.all()
    torch.testing.assert_close(whole.weight, awkward_layer.weight)
    empty = pruner.prune(*awkward_layer, Unstructured(1.0, group))
    assert not empty.keep.any()
    assert not raw(empty.weight).any()


@pytest.mark.parametrize("name", PRUNERS.names())
def test_memory_layout_and_inference_mode_change_nothing(name: str, awkward_layer: Layer) -> None:
    weight, stats = awkward_layer
    expected = build(PRUNERS, name).prune(weight, stats, NM(2, 4))
    assert same(build(PRUNERS, name).prune(weight.T.contiguous().T, stats, NM(2, 4)), expected)
    with torch.inference_mode():
        assert same(build(PRUNERS, name).prune(weight.clone(), stats, NM(2, 4)), expected)
