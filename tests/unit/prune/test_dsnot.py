"""DSnoT against its published worked example and a loop over rows."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.registry import build
from compressllm.core.stats import InputStats, StatsAccumulator
from compressllm.prune.dsnot import DSnoT, swap
from compressllm.prune.wanda import Wanda

FREE: dict[str, Any] = {"max_rise": math.inf, "threshold": 0.0}
PATTERNS = [NM(2, 4), NM(4, 8), NM(1, 4), Unstructured(0.5, "row"), Unstructured(0.7, "layer")]

# One row of 8 weights, worked by hand. Its statistics are sums over tokens, and so are the contributions.
WEIGHT = torch.tensor([[1.0, -0.8, 0.6, -2.0, 0.3, 1.5, -0.4, 0.9]])
SUMS = torch.tensor([0.5, -1.0, 2.0, 0.25, -2.0, -0.4, -1.5, 0.3])
NORMS = torch.tensor([1.1, 2.0, 1.5, 1.0, 2.5, 0.7, 2.0, 0.8])
SPREADS = torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0, 0.4, 1.0, 0.8])


def removed_of(keep: Tensor) -> set[int]:
    return set((~keep[0]).nonzero().flatten().tolist())


@pytest.mark.parametrize(("same_sign", "expected"), [(True, {2, 4, 6, 7}), (False, {0, 3, 5, 7})])
def test_worked_example(same_sign: bool, expected: set[int]) -> None:
    contribution, score = WEIGHT * SUMS, WEIGHT.abs() * NORMS
    keep = Unstructured(0.5, "row").keep(score)
    assert removed_of(keep) == {2, 4, 6, 7}
    assert float((contribution * ~keep).sum()) == pytest.approx(1.47)
    options = {"cycles": 50, "threshold": 0.1, "same_sign": same_sign}
    assert removed_of(swap(keep, contribution, contribution / SPREADS, score, **options)) == expected

    stats = InputStats(tokens=1, mean=SUMS, var=SPREADS, sqnorm=NORMS.square())
    whole = DSnoT(threshold=0.1, same_sign=same_sign, max_rise=math.inf).prune(WEIGHT, stats, Unstructured(0.5, "row"))
    assert removed_of(whole.keep) == expected
    assert whole.notes["shift_before"] == pytest.approx(1.47)
    assert whole.notes["shift_after"] == pytest.approx(1.47 if same_sign else 0.33, rel=1e-5)
    assert whole.notes["swaps"] == (0 if same_sign else 3)


def test_cycles_and_threshold_end_a_row() -> None:
    contribution, score = WEIGHT * SUMS, WEIGHT.abs() * NORMS
    keep = Unstructured(0.5, "row").keep(score)

    def removed(**options: Any) -> set[int]:
        return removed_of(swap(keep, contribution, contribution / SPREADS, score, same_sign=False, **options))

    assert removed(cycles=1, threshold=0.1) == {4, 5, 6, 7}
    assert removed(cycles=2, threshold=0.1) == {0, 5, 6, 7}
    assert removed(cycles=1000, threshold=0.4) == {4, 5, 6, 7}  # |r| is 0.33 after one swap
    assert removed(cycles=1000, threshold=2.0) == {2, 4, 6, 7}


def random_layer(seed: int, rows: int = 12, columns: int = 32, tokens: int = 64) -> tuple[Tensor, InputStats, Tensor]:
    """A weight, the statistics of correlated inputs with means, and those inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) * 0.2
    x = x + torch.randn(columns, generator=generator)
    stats = StatsAccumulator(frozenset({"mean", "var", "sqnorm", "hessian"}))
    stats.add_(x)
    return torch.randn(rows, columns, generator=generator), stats.finish("layer"), x


def refine_slowly(
    weight: Tensor, keep: Tensor, stats: InputStats, pattern: SparsityPattern, same_sign: bool, power: float = 1.0
) -> Tensor:
    """One row after another, with lists and sorts."""
    refined = keep.clone()
    size = pattern.m if isinstance(pattern, NM) else None
    for i in range(len(weight)):
        shares = (weight[i] * stats.need("mean")).tolist()
        spreads = stats.need("var").tolist()
        wanda = (weight[i].abs() * stats.need("sqnorm").sqrt()).tolist()
        gone = [j for j in range(len(shares)) if not keep[i, j]]
        kept = [j for j in range(len(shares)) if keep[i, j]]
        keys = {j: shares[j] / spreads[j] ** power if spreads[j] ** power else 0.0 for j in gone}
        up, down = (sorted((j for j in gone if keys[j] * s > 0), key=lambda j: -abs(keys[j])) for s in (1, -1))
        negative, positive = (sorted((j for j in kept if shares[j] * s > 0), key=wanda.__getitem__) for s in (-1, 1))
        r = sum(shares[j] for j in gone)
        sign = math.copysign(1.0, r)
        for _ in range(50):
            grow = up if r > 0 else down
            if not grow or not r:
                break
            g = grow.pop(0)
            if size is None:
                cut = negative if r > 0 else positive
            else:
                group = range(g // size * size, g // size * size + size)
                cut = sorted((j for j in kept if j in group), key=wanda.__getitem__)
            if not cut:
                break
            p = cut.pop(0)
            after = r + shares[p] - shares[g]
            if (same_sign or size) and (after * sign <= 0 or abs(after) > abs(r)):
                break
            if size:
                kept.remove(p)
            refined[i, g], refined[i, p], r = True, False, after
    return refined


@pytest.mark.parametrize("same_sign", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_refining_is_the_loop_over_rows(pattern: SparsityPattern, same_sign: bool) -> None:
    moved = 0
    for seed in range(4):
        weight, stats, _ = random_layer(seed)
        keep = pattern.keep(weight.abs())
        for power in (1.0, 0.0, 0.5):
            refiner = DSnoT(same_sign=same_sign, variance_power=power, **FREE)
            expected = refine_slowly(weight, keep, stats, pattern, same_sign, power)
            rows = better_rows(weight, keep, expected, stats)  # without same_sign a row may end where |r| is larger
            expected = torch.where(rows[:, None], expected, keep)
            assert torch.equal(refiner.refine(weight, keep, stats, pattern).keep, expected)
            moved += int((expected ^ keep).sum())
    assert moved > 100


def shifts(weight: Tensor, keep: Tensor, stats: InputStats) -> Tensor:
    """|r| of each row, from the finished mask, in float64."""
    return ((weight * ~keep).double() @ stats.need("mean").double()).abs()


def better_rows(weight: Tensor, keep: Tensor, refined: Tensor, stats: InputStats) -> Tensor:
    return shifts(weight, refined, stats) <= shifts(weight, keep, stats) * (1 + 1e-6)


@pytest.mark.parametrize("same_sign", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_stay_and_the_mean_output_is_never_further_off(pattern: SparsityPattern, same_sign: bool) -> None:
    for seed in range(4):
        weight, stats, _ = random_layer(seed)
        keep = pattern.keep(weight.abs())
        refined = DSnoT(same_sign=same_sign, **FREE).refine(weight, keep, stats, pattern)
        size = pattern.m if isinstance(pattern, NM) else 32
        counts = [mask.view(12, -1, size).sum(-1) for mask in (keep, refined.keep)]
        assert torch.equal(*counts)
        assert better_rows(weight, keep, refined.keep, stats).all()
        assert torch.equal(refined.weight, weight * refined.keep)
        before, after = (shifts(weight, mask, stats).mean() for mask in (keep, refined.keep))
        assert refined.notes["shift_before"] == pytest.approx(float(before), rel=1e-4)
        assert refined.notes["shift_after"] == pytest.approx(float(after), rel=1e-3, abs=1e-6)
        assert after < 0.9 * before
        assert refined.notes["swaps"] == int((refined.keep & ~keep).sum()) > 0


def test_every_swap_brings_the_mean_output_nearer() -> None:
    for pattern in PATTERNS:
        weight, stats, _ = random_layer(5)
        keep = pattern.keep(weight.abs())
        last = shifts(weight, keep, stats)
        for cycles in range(1, 12):
            refined = DSnoT(cycles=cycles, **FREE).refine(weight, keep, stats, pattern).keep
            now = shifts(weight, refined, stats)
            assert (now <= last + 1e-5).all()
            last = now


def loss_with(stats: InputStats, x: Tensor, exact: bool) -> Callable[[Tensor], Tensor]:
    """Mean squared output error of each row for what is lost of its weight."""
    if exact:
        return lambda lost: (x @ lost.T).square().mean(0)
    # inputs of the same means and variances that are uncorrelated, written out as a second moment
    second = torch.outer(stats.need("mean"), stats.need("mean")) + torch.diag(stats.need("var"))
    return lambda lost: ((lost @ second) * lost).sum(1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("max_rise", [0.0, 0.02])
def test_rows_whose_loss_rises_too_far_get_their_mask_back(exact: bool, max_rise: float) -> None:
    weight, stats, x = random_layer(0, rows=40)
    keep = Wanda().prune(weight, stats, Unstructured(0.5, "row")).keep
    loss = loss_with(stats, x, exact)
    free = DSnoT(**FREE).refine(weight, keep, stats, Unstructured(0.5, "row"))
    before, after = loss(weight * ~keep), loss(weight * ~free.keep)
    allowed = after <= before * (1 + max_rise)
    assert 0 < int(allowed.sum()) < 40
    held = DSnoT(max_rise=max_rise, threshold=0.0, exact=exact).refine(weight, keep, stats, Unstructured(0.5, "row"))
    assert torch.equal(held.keep, torch.where(allowed[:, None], free.keep, keep))
    assert held.notes["rows_reverted"] == int((~allowed).sum())
    assert held.notes["loss_before"] == pytest.approx(float(before.mean()), rel=1e-4)
    assert held.notes["loss_after"] == pytest.approx(float(torch.where(allowed, after, before).mean()), rel=1e-4)


def test_a_row_that_has_ended_is_left_alone() -> None:
    weight, stats, _ = random_layer(1)
    keep = Unstructured(0.5, "row").keep(weight.abs())
    still = DSnoT(threshold=1e9, max_rise=math.inf).refine(weight, keep, stats, Unstructured(0.5, "row"))
    assert torch.equal(still.keep, keep)
    some = DSnoT(threshold=float(shifts(weight, keep, stats).median()), max_rise=math.inf)
    ended = shifts(weight, keep, stats) <= some.threshold
    refined = some.refine(weight, keep, stats, Unstructured(0.5, "row")).keep
    assert torch.equal(refined[ended], keep[ended])
    assert not torch.equal(refined[~ended], keep[~ended])


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_inputs_that_are_dead_or_constant(power: float) -> None:
    weight, _, x = random_layer(2)
    x[:, 3], x[:, 4:8], x[:, 9] = 0.0, 0.0, 1.5
    accumulator = StatsAccumulator(frozenset({"mean", "var", "sqnorm"}))
    accumulator.add_(x)
    stats = accumulator.finish("layer")
    assert float(stats.need("var")[9]) == 0.0
    for pattern in PATTERNS:
        keep = (
            pattern.keep(-torch.arange(32.0).repeat(12, 1)) if isinstance(pattern, NM) else pattern.keep(weight.abs())
        )
        refined = DSnoT(variance_power=power, **FREE).refine(weight, keep, stats, pattern).keep
        assert torch.equal(refined.sum(1), keep.sum(1))
        assert not (refined & ~keep)[:, 3:8].any()  # reviving them would change nothing
        assert power == 0.0 or not (refined & ~keep)[:, 9].any()
        assert torch.equal(refined, refine_slowly(weight, keep, stats, pattern, True, power))


def test_equal_keys_and_scores_go_by_column() -> None:
    weight = torch.ones(1, 8)
    keep = torch.tensor([[True, True, False, False, False, False, True, True]])
    mean = torch.tensor([1.0, -1, 1, 1, 1, 1, -1, -1])
    stats = InputStats(tokens=1, mean=mean, var=torch.ones(8), sqnorm=torch.ones(8))
    refined = DSnoT(cycles=1, **FREE).refine(weight, keep, stats, Unstructured(0.5, "row")).keep
    assert removed_of(refined) == {1, 3, 4, 5}


def test_layers_are_refined_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats, _ = random_layer(3, rows=13)
    whole = DSnoT().prune(weight, stats, NM(2, 4))
    monkeypatch.setattr("compressllm.prune.dsnot._AT_ONCE", 96)
    pieces = DSnoT().prune(weight, stats, NM(2, 4))
    assert torch.equal(pieces.keep, whole.keep)
    assert pieces.notes == pytest.approx(whole.notes)


def test_it_starts_from_any_pruner_and_reads_what_that_reads() -> None:
    weight, stats, _ = random_layer(4)
    refiner = build(PRUNERS, {"dsnot": {"init": "magnitude", "threshold": 0.0, "max_rise": math.inf}})
    assert refiner.group == "layer"
    assert refiner.needs == {"mean", "var", "sqnorm"}
    assert build(PRUNERS, {"dsnot": {"exact": True}}).needs == {"mean", "var", "sqnorm", "hessian"}
    pattern = Unstructured(0.6, "layer")
    keep = build(PRUNERS, "magnitude").prune(weight, stats, pattern).keep
    assert len(set(keep.sum(1).tolist())) > 1  # rows of different counts
    refined = refiner.prune(weight, stats, pattern).keep
    assert torch.equal(refined.sum(1), keep.sum(1))
    assert torch.equal(refined, refine_slowly(weight, keep, stats, pattern, True))


def test_what_the_initial_pruner_did_instead_is_passed_on() -> None:
    class Hapless(Wanda):
        def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
            return replace(super().prune(weight, stats, pattern), fallback="chose by the stars")

    weight, stats, _ = random_layer(4)
    assert DSnoT(init=Hapless()).prune(weight, stats, NM(2, 4)).fallback == "chose by the stars"
    assert DSnoT().prune(weight, stats, NM(2, 4)).fallback is None


@pytest.mark.parametrize("option", [{"cycles": 0}, {"threshold": -1.0}, {"max_rise": -0.5}, {"variance_power": -1.0}])
def test_options_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"^pruner dsnot: {next(iter(option))} "):
        build(PRUNERS, {"dsnot": option})
