from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressllm.core.launch import launched_ranks
from compressllm.core.pooling import finish_stats, pool_stats
from compressllm.core.ranks import ALONE
from compressllm.core.stats import InputStats, Need, StatsAccumulator

Launch = Callable[..., list[Any]]
EVERY: tuple[Need, ...] = ("mean", "var", "sqnorm", "hessian")
CPU = torch.device("cpu")


def accumulate(batches: list[Tensor], needs: frozenset[Need] = frozenset(EVERY)) -> StatsAccumulator:
    seen = StatsAccumulator(needs)
    for batch in batches:
        seen.add_(batch)
    return seen


@pytest.fixture
def parts() -> list[list[Tensor]]:
    """Per rank, batches of (tokens, 6); the ranks' means lie far apart, and the last rank saw nothing."""
    random = torch.Generator().manual_seed(0)
    sizes = [[5, 3], [11], []]
    return [
        [torch.randn(tokens, 6, generator=random) + 10 * rank for tokens in size] for rank, size in enumerate(sizes)
    ]


def expected(inputs: Tensor) -> dict[str, Tensor]:
    """By the definitions, in float64."""
    x = inputs.double()
    return {
        "mean": x.mean(0),
        "var": ((x - x.mean(0)) ** 2).mean(0),
        "sqnorm": (x * x).mean(0),
        "hessian": x.T @ x / len(x),
    }


@pytest.mark.parametrize("needs", [EVERY, *[(need,) for need in EVERY]], ids=str)
def test_pooled_statistics_are_those_of_all_tokens(
    launch: Launch, parts: list[list[Tensor]], needs: tuple[Need, ...]
) -> None:
    def work(rank: int) -> InputStats:
        with launched_ranks() as ranks:
            return pool_stats(ranks, {"a": accumulate(parts[rank], frozenset(needs))}, CPU)["a"].finish("a")

    results = launch(work, 3)
    exact = expected(torch.cat([batch for part in parts for batch in part]))
    for stats in results:
        assert stats.tokens == 19
        for name in needs:
            torch.testing.assert_close(stats.need(name).double(), exact[name], rtol=1e-5, atol=1e-5)
            assert torch.equal(stats.need(name), results[0].need(name))  # the same bits on all ranks


def test_what_all_ranks_share_is_summed_once_and_nothing_else_is_shared(
    launch: Launch, parts: list[list[Tensor]]
) -> None:
    def work(rank: int) -> tuple[list[int], dict[str, tuple[int, Tensor]]]:
        # The second rank did not find out that "up" is called with what "gate" is called with.
        gate = accumulate(parts[rank])
        mine = {"q": accumulate(parts[rank]), "gate": gate, "up": gate if rank == 0 else accumulate(parts[rank])}
        mine["k"] = mine["q"]
        sizes: list[int] = []
        with launched_ranks() as ranks:
            sum_ = ranks.sum_
            ranks.sum_ = lambda tensors: sizes.append(len(tensors)) or sum_(tensors)
            pooled = finish_stats(pool_stats(ranks, mine, CPU))
        assert pooled["q"] is pooled["k"]
        assert len({id(pooled[name]) for name in ("q", "gate", "up")}) == 3
        return sizes, {name: (one.tokens, one.hessian) for name, one in pooled.items()}

    for sizes, pooled in launch(work):
        assert sizes == [3, 9]  # of q, gate and up: means, then the three other statistics
        assert list(pooled) == ["q", "gate", "up", "k"]
        assert {tokens for tokens, _ in pooled.values()} == {19}
        assert all(torch.equal(hessian, pooled["q"][1]) for _, hessian in pooled.values())


def test_what_no_rank_saw_stays_unseen(launch: Launch) -> None:
    def work(rank: int) -> tuple[int, dict[Any, Any]]:
        with launched_ranks() as ranks:
            one = pool_stats(ranks, {"a": StatsAccumulator(frozenset(EVERY))}, CPU)["a"]
            return one.tokens, one.totals

    assert launch(work) == [(0, {})] * 2


def test_alone_everything_stays_as_it_is(parts: list[list[Tensor]]) -> None:
    mine = {"a": accumulate(parts[0])}
    assert pool_stats(ALONE, mine, CPU)["a"] is mine["a"]
