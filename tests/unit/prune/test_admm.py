from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS
from compressllm.core.registry import build
from compressllm.core.stats import InputStats, StatsAccumulator
from compressllm.prune import admm
from compressllm.prune.admm import ADMM, Search, selection
from compressllm.prune.refit import refit_weights, scale_hessian

OUT, COLUMNS, TOKENS = 48, 64, 256


def layer(seed: int = 0, out: int = OUT) -> tuple[Tensor, InputStats]:
    """A weight and the correlated Gaussian inputs it saw, a few of them outliers."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1.0, COLUMNS + 1) ** -0.5
    x = (torch.randn(TOKENS, COLUMNS, generator=generator) * spectrum) @ torch.randn(
        COLUMNS, COLUMNS, generator=generator
    ) + 0.3
    x[:, 9:11] *= 20.0
    stats = StatsAccumulator(frozenset({"sqnorm", "hessian"}))
    stats.add_(x)
    return torch.randn(out, COLUMNS, generator=generator), stats.finish("layer")


def damped(hessian: Tensor) -> Tensor:
    """G + λI in float64."""
    exact = hessian.double()
    return exact + 0.01 * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)


def loss(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """Damped loss, relative to removing everything."""
    apart, whole = (weight - other).double(), weight.double()
    exact = damped(hessian)
    return float(((apart @ exact) * apart).sum() / ((whole @ exact) * whole).sum())


def sparsegpt_slowly(weight: Tensor, hessian: Tensor, pattern: SparsityPattern, block: int = 32) -> Tensor:
    """SparseGPT by its definition: at each column the inverse Hessian of what is still free, in float64."""
    values, exact = weight.double(), damped(hessian)
    width = pattern.m if isinstance(pattern, NM) else block
    for column in range(COLUMNS):
        inverse = torch.linalg.inv(exact[column:, column:])
        if column % width == 0:
            stop = column + width
            saliency = [values[:, at] ** 2 / torch.linalg.inv(exact[at:, at:])[0, 0] for at in range(column, stop)]
            keep = pattern.keep(torch.stack(saliency, 1))
        error = torch.where(keep[:, column % width], 0.0, values[:, column]) / inverse[0, 0]
        values[:, column:] -= error[:, None] * inverse[0]
    return values


def admm_slowly(weight: Tensor, hessian: Tensor, pattern: SparsityPattern, method: ADMM) -> Tensor:
    """The mask of the same iteration as published: unscaled dual variable, dense solves, float64."""
    exact = damped(hessian)
    size = exact.diagonal().sqrt()
    matrix, dense = exact / size / size[:, None], weight.double() * size
    eye = torch.eye(COLUMNS, dtype=torch.float64)
    sparse = torch.where(pattern.keep(dense**2), dense, 0.0)
    dual = method.penalties()[0] * (dense - sparse)  # it starts after a step that left the free copy dense
    for penalty in method.penalties():
        for _ in range(method.steps):
            free = torch.linalg.solve(matrix + penalty * eye, dense @ matrix - dual + penalty * sparse, left=False)
            both = free + dual / penalty
            sparse = torch.where(pattern.keep(both**2), both, 0.0)
            dual = dual + penalty * (free - sparse)
    return pattern.keep(both**2)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4)], ids=str)
def test_is_the_published_iteration(pattern: SparsityPattern) -> None:
    weight, stats = layer()
    keep = ADMM().prune(weight, stats, pattern).keep
    agree = (keep == admm_slowly(weight, stats.need("hessian"), pattern, ADMM())).double().mean()
    assert agree > 0.995  # near-ties may fall the other way in float32


@pytest.mark.parametrize("pattern", [Unstructured(f, g) for f in (0.5, 0.7, 0.8) for g in ("row", "layer")], ids=str)
def test_holding_the_threshold_costs_nothing(pattern: SparsityPattern) -> None:
    weight, stats = layer()
    hessian = stats.need("hessian")
    slow = refit_weights(weight, admm_slowly(weight, hessian, pattern, ADMM()), hessian, iterations=100)
    assert loss(weight, ADMM().prune(weight, stats, pattern).weight, hessian) < 1.02 * loss(weight, slow, hessian)


BETTER = [Unstructured(0.5, "layer"), Unstructured(0.6, "layer"), Unstructured(0.7, "row"), Unstructured(0.8, "layer")]


@pytest.mark.parametrize("pattern", [*BETTER, NM(2, 4), NM(4, 8)], ids=str)
def test_is_better_than_sparsegpt_and_than_refitting_wanda(pattern: SparsityPattern) -> None:
    weight, stats = layer()
    hessian = stats.need("hessian")
    found = loss(weight, ADMM().prune(weight, stats, pattern).weight, hessian)
    assert found < 0.9 * loss(weight, sparsegpt_slowly(weight, hessian, pattern), hessian)
    assert found < loss(weight, build(PRUNERS, "refit").prune(weight, stats, pattern).weight, hessian)


def test_the_weights_are_the_best_on_the_mask() -> None:
    weight, stats = layer()
    hessian = stats.need("hessian")
    pruned = ADMM().prune(weight, stats, NM(2, 4))
    best = refit_weights(weight, pruned.keep, hessian, iterations=200, tolerance=1e-7)
    assert loss(weight, pruned.weight, hessian) < 1.001 * loss(weight, best, hessian)
    assert pruned.notes["damped_loss"] == pytest.approx(loss(weight, pruned.weight, hessian), rel=1e-4)
    assert pruned.notes["iterations"] <= 32
    assert 0.0 <= pruned.notes["support_change"] < 0.05


def test_with_a_mask_that_is_given_it_goes_to_the_refit() -> None:
    weight, stats = layer()
    hessian, scaled = stats.need("hessian"), scale_hessian(stats.need("hessian"), 0.01)
    keep = NM(2, 4).keep(weight.abs())

    given = type("Given", (), {"keep": lambda self, scores: keep})()
    search = Search(weight * scaled.scale, given)
    inverse = torch.linalg.inv(scaled.matrix + 0.1 * torch.eye(COLUMNS))
    search.run_(inverse, 0.1, 2000)
    limit = torch.where(keep, search.both, 0.0) / scaled.scale
    best = refit_weights(weight, keep, hessian, iterations=300, tolerance=1e-7)
    torch.testing.assert_close(limit, best, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(1, 4), NM(2, 4), NM(3, 4), NM(4, 8), NM(9, 16)], ids=str)
def test_picks_the_largest_of_every_group(pattern: NM) -> None:
    values = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(selection(pattern, values)(values, slice(None)), pattern.keep(values.square()))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_holds_the_threshold_it_was_made_with(group: str, fraction: float) -> None:
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    pattern = Unstructured(fraction, group)
    pick = selection(pattern, values)
    assert torch.equal(pick(values[2:5], slice(2, 5)), pattern.keep(values.square())[2:5])
    assert pick(values[2:5] * 1e9, slice(2, 5)).all() == (fraction < 1.0)


def test_linears_of_one_input_share_the_inverses(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, stats), made, inverse = layer(), [], admm._inverse
    monkeypatch.setattr(admm, "_inverse", lambda *given: made.append(given) or inverse(*given))
    first = ADMM().prune(weight, stats, NM(2, 4))
    count = len(made)
    assert count == 16
    again = ADMM().prune(weight, stats, NM(2, 4))
    assert len(made) == count
    monkeypatch.setattr(admm, "SHARED_BYTES", 0)
    alone = ADMM().prune(weight, replace(stats), NM(2, 4))
    assert count < len(made) <= 2 * count  # no more than it needs, if not for others
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.weight, alone.weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "layer")], ids=str)
def test_the_number_of_threads_changes_no_bit(pattern: SparsityPattern) -> None:
    weight, stats = layer(out=150)
    one = ADMM().prune(weight, stats, pattern)
    try:
        torch.set_num_threads(3)
        three = ADMM().prune(weight, replace(stats), pattern)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(three.weight, one.weight)
    assert three.notes == one.notes


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_hessian_of_few_tokens_or_of_none(damping: float) -> None:
    weight, _ = layer()
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(5))
    for hessian in (x.T @ x / 3, torch.zeros(COLUMNS, COLUMNS)):
        pruned = ADMM(damping=damping).prune(weight, InputStats(3, hessian=hessian), NM(2, 4))
        assert pruned.weight.isfinite().all()
        assert NM(2, 4).violations(pruned.keep) == 0
    largest = NM(2, 4).keep(weight.abs())  # nothing is known of the inputs
    assert (pruned.keep == largest).double().mean() > 0.998
    torch.testing.assert_close(pruned.weight, weight * pruned.keep, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stages", 0),
        ("steps", 0),
        ("penalty_start", 0.0),
        ("penalty_end", 0.05),
        ("damping", -1.0),
        ("refit_steps", -1),
    ],
)
def test_options_that_make_no_sense(option: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"{option}=.*: needs to be at least"):
        build(PRUNERS, {"admm": {option: value}})
