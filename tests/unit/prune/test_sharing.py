import torch

from compressllm.core.stats import InputStats
from compressllm.prune.sharing import assign_linears

SHAPES = {
    "q": (8, 8),
    "k": (4, 8),
    "v": (4, 8),
    "o": (8, 8),
    "gate": (24, 8),
    "up": (24, 8),
    "down": (8, 24),
}


def stats_of(hessian: bool = True) -> dict[str, InputStats]:
    """As a block gives them: q, k and v share their statistics, and so do gate and up."""
    seen = {
        name: InputStats(5, sqnorm=torch.ones(SHAPES[name][1]), hessian=torch.eye(SHAPES[name][1]) if hessian else None)
        for name in ("q", "o", "gate", "down")
    }
    return seen | {"k": seen["q"], "v": seen["q"], "up": seen["gate"]}


def test_linears_go_to_the_rank_with_the_least_to_do_the_costliest_first() -> None:
    # With a Hessian out * in^2: down 4608; gate and up 3072; q, k and v 1024; o 512.
    assert assign_linears(SHAPES, stats_of(), 2) == dict.fromkeys(SHAPES, 1) | {"down": 0}
    # Without, out * in: gate and up 384; down 192; q, k and v 128; o 64.
    assert assign_linears(SHAPES, stats_of(hessian=False), 2) == dict.fromkeys(SHAPES, 1) | {"gate": 0, "up": 0}


def test_linears_that_share_statistics_stay_together() -> None:
    for ranks in (1, 2, 3, 4, 9):
        owner = assign_linears(SHAPES, stats_of(), ranks)
        assert list(owner) == list(SHAPES)
        assert owner["q"] == owner["k"] == owner["v"]
        assert owner["gate"] == owner["up"]
        assert len(set(owner.values())) == min(ranks, 4)


def test_without_statistics_every_linear_goes_its_own_way() -> None:
    nothing = dict.fromkeys(SHAPES, InputStats(tokens=0))
    owner = assign_linears(SHAPES, nothing, 7)
    assert sorted(owner.values()) == list(range(7))
