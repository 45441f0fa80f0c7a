import pytest
import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS
from compressllm.core.registry import build
from compressllm.core.stats import InputStats, StatsAccumulator
from compressllm.prune.refit import damped_energy, refit_scaled, refit_weights, scale_hessian

OUT, COLUMNS = 10, 32


def layer(seed: int = 0, out: int = OUT, columns: int = COLUMNS, tokens: int = 256) -> tuple[Tensor, InputStats]:
    """A weight and what it saw: correlated inputs off zero, two of them outliers and one dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) + 1.0
    x[:, 3:5] *= 20.0
    x[:, 7] = 0.0
    stats = StatsAccumulator(frozenset({"sqnorm", "hessian"}))
    stats.add_(x)
    return torch.randn(out, columns, generator=generator), stats.finish("layer")


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """G + λI in float64."""
    exact = hessian.double()
    return exact + damping * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)


def loss(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """(out,) damped loss of each row, in float64."""
    apart = (weight - other).double()
    return ((apart @ damped(hessian)) * apart).sum(1)


def solve_slowly(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """Ridge least squares on the kept columns, row by row, in float64."""
    exact, solved = damped(hessian), torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(len(weight)):
        kept = keep[row].nonzero().flatten()
        wanted = exact[kept] @ weight[row].double()
        solved[row, kept] = torch.linalg.solve(exact[kept][:, kept], wanted)
    return solved


PATTERNS = [NM(2, 4), NM(1, 8), Unstructured(0.5, "row"), Unstructured(0.8, "layer")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_converges_to_ridge_least_squares_of_every_row(pattern: SparsityPattern) -> None:
    weight, stats = layer()
    hessian = stats.need("hessian")
    keep = pattern.keep(weight.abs())
    refitted = refit_weights(weight, keep, hessian, iterations=300, tolerance=1e-7)
    expected = solve_slowly(weight, keep, hessian)
    torch.testing.assert_close(refitted.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss(weight, refitted, hessian), loss(weight, expected, hessian), rtol=1e-5, atol=0.0)


def test_outlier_inputs_do_not_slow_it_down() -> None:
    weight, stats = layer()
    keep = NM(2, 4).keep(weight.abs())
    twenty = refit_weights(weight, keep, stats.need("hessian"), iterations=COLUMNS // 2 + 4, tolerance=0.0)
    best = loss(weight, solve_slowly(weight, keep, stats.need("hessian")), stats.need("hessian"))
    assert (loss(weight, twenty, stats.need("hessian")) <= 1.01 * best).all()


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 100])
def test_no_row_is_ever_worse_than_the_start(iterations: int) -> None:
    weight, stats = layer()
    hessian = stats.need("hessian")
    keep = NM(2, 4).keep(weight.abs())
    solved = solve_slowly(weight, keep, hessian).float()
    for start in (weight, torch.zeros_like(weight), solved, 3.0 * weight):
        refitted = refit_weights(weight, keep, hessian, start=start, iterations=iterations, tolerance=0.0)
        begun = torch.where(keep, start, 0.0)
        assert (loss(weight, refitted, hessian) <= loss(weight, begun, hessian) * (1 + 1e-5)).all()
        assert not refitted[~keep].any()
        if iterations == 0:
            torch.testing.assert_close(refitted, begun)


def test_the_reported_loss_is_the_loss() -> None:
    weight, stats = layer()
    keep, scaled = NM(2, 4).keep(weight.abs()), scale_hessian(stats.need("hessian"), 0.01)
    fit = refit_scaled(weight, keep, scaled)
    exact = loss(weight, fit.weight, stats.need("hessian"))
    torch.testing.assert_close(fit.loss.double(), exact, rtol=1e-4, atol=1e-4)
    whole = loss(weight, torch.zeros_like(weight), stats.need("hessian")).sum()
    assert damped_energy(weight, scaled) == pytest.approx(float(whole), rel=1e-5)
    assert 0 < fit.steps <= 30


def test_a_loose_tolerance_stops_early() -> None:
    weight, stats = layer()
    keep, scaled = NM(2, 4).keep(weight.abs()), scale_hessian(stats.need("hessian"), 0.01)
    steps = [refit_scaled(weight, keep, scaled, tolerance=tolerance).steps for tolerance in (1e9, 0.1, 1e-3)]
    assert steps[0] == 0 < steps[1] < steps[2]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_were_always_zero_and_weights_that_are_all_kept(damping: float) -> None:
    weight, stats = layer()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[0], keep[1] = True, False
    for hessian in (stats.need("hessian"), torch.zeros(COLUMNS, COLUMNS)):
        refitted = refit_weights(weight, keep, hessian, damping=damping)
        assert refitted.isfinite().all()
        torch.testing.assert_close(refitted[0], weight[0])
        assert not refitted[1].any()
        torch.testing.assert_close(refitted[:, 7], weight[:, 7] * keep[:, 7])  # nothing is known of it: left alone


def test_the_number_of_threads_changes_no_bit() -> None:
    weight, stats = layer(out=200)
    keep = NM(2, 4).keep(weight.abs())
    one = refit_weights(weight, keep, stats.need("hessian"))
    try:
        torch.set_num_threads(3)
        assert torch.equal(refit_weights(weight, keep, stats.need("hessian")), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("init", ["wanda", "magnitude"])
def test_refines_the_weights_of_another_pruner(init: str) -> None:
    weight, stats = layer()
    refined = build(PRUNERS, {"refit": {"init": init}}).prune(weight, stats, NM(2, 4))
    first = build(PRUNERS, init).prune(weight, stats, NM(2, 4))
    hessian = stats.need("hessian")
    assert torch.equal(refined.keep, first.keep)
    before, after = loss(weight, first.weight, hessian).sum(), loss(weight, refined.weight, hessian).sum()
    assert after < 0.8 * before
    whole = loss(weight, torch.zeros_like(weight), hessian).sum()
    assert refined.notes["damped_loss"] == pytest.approx(float(after / whole), rel=1e-3)
    assert build(PRUNERS, {"refit": {"init": init}}).group == build(PRUNERS, init).group


@pytest.mark.parametrize("options", [{"damping": -0.1}, {"iterations": -1}, {"tolerance": float("nan")}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="needs to be at least 0"):
        build(PRUNERS, {"refit": options})
