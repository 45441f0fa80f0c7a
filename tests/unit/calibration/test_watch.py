import pytest
import torch
from torch import Tensor, nn

from compressllm.calibration.inputs import Enough
from compressllm.calibration.watch import InputWatch
from compressllm.core.errors import CalibrationError

NEEDS = frozenset({"sqnorm"})


class Toy(nn.Module):
    """Two linears on one tensor, one on an equal copy of it, one behind them, and a count of whole passes."""

    def __init__(self, repeat: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.copied, self.down = (nn.Linear(4, 4) for _ in range(4))
        self.repeat, self.whole = repeat, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.q(x) * self.k(x) + self.copied(x.clone())
        for _ in range(self.repeat):
            hidden = self.down(hidden)
        self.whole += 1
        return hidden


def watch(toy: Toy, batches: list[Tensor]) -> InputWatch:
    linears = {name: toy.get_submodule(name) for name in ("q", "k", "copied", "down")}

    def run(batch: Tensor) -> None:
        try:
            toy(batch)
        except Enough:
            assert toy.whole == 1

    with InputWatch(linears, NEEDS) as watched, torch.inference_mode():
        for batch in batches:
            watched.merge_(watched.measure(lambda batch=batch: run(batch)))
    return watched


def test_statistics_are_shared_by_identity_and_not_by_value() -> None:
    batches = list(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)))
    stats = watch(Toy(), batches).finish()
    assert stats["q"] is stats["k"]
    assert stats["q"] is not stats["copied"]
    torch.testing.assert_close(stats["q"].sqnorm, torch.cat(batches).square().mean(0))
    assert torch.equal(stats["q"].need("sqnorm"), stats["copied"].need("sqnorm"))
    assert {one.tokens for one in stats.values()} == {15}


def test_passes_after_the_first_end_at_the_last_linear() -> None:
    toy = Toy()
    watch(toy, [torch.randn(5, 4) for _ in range(4)])
    assert toy.whole == 1


def test_a_linear_that_is_called_twice_counts_twice_and_no_pass_is_cut() -> None:
    toy = Toy(repeat=2)
    stats = watch(toy, [torch.randn(5, 4) for _ in range(3)]).finish()
    assert toy.whole == 3
    assert (stats["down"].tokens, stats["q"].tokens) == (30, 15)


def test_a_linear_that_is_not_called_is_named_and_no_pass_is_cut() -> None:
    toy = Toy(repeat=0)
    watched = watch(toy, [torch.randn(5, 4) for _ in range(3)])
    assert toy.whole == 3
    with pytest.raises(CalibrationError, match="down: saw no token"):
        watched.finish()


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    toy = Toy()
    with pytest.raises(RuntimeError):
        watch(toy, [torch.randn(5, 3)])
    watch(toy, [torch.randn(5, 4)])
    assert not any(module._forward_pre_hooks for module in toy.modules())
