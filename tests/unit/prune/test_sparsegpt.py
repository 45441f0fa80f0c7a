from typing import Any

import pytest
import torch
from torch import Tensor

from compressllm.core import factor
from compressllm.core.errors import CalibrationError, PatternError, RecipeError
from compressllm.core.factor import inverse_factor
from compressllm.core.layererror import relative_error
from compressllm.core.masks import raw
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS
from compressllm.core.registry import build
from compressllm.core.stats import InputStats
from compressllm.prune import sparsegpt
from compressllm.prune.sparsegpt import SparseGPT, compensate

ROWS, COLUMNS = 10, 24


def random_weight(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_stats(columns: int = COLUMNS, tokens: int = 200, seed: int = 1) -> InputStats:
    """Of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.linspace(0.5, 3.0, columns)
    gram = x.T @ x / tokens
    return InputStats(tokens, hessian=gram, sqnorm=gram.diagonal().clone())


def damped(stats: InputStats) -> Tensor:
    hessian = stats.need("hessian").double()
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def prune_slowly(weight: Tensor, stats: InputStats, pattern: SparsityPattern, block: int) -> tuple[Tensor, Tensor]:
    """The paper's algorithm in float64: every column inverts the Hessian of what is left, and changes row by row."""
    left, hessian = weight.double().clone(), damped(stats)
    rows, columns = weight.shape
    inverses = [torch.linalg.inv(hessian[at:, at:]) for at in range(columns)]
    keep = torch.ones(rows, columns, dtype=torch.bool)
    gone = 0

    def choose(places: list[tuple[int, int]], remove: int) -> None:
        cost = {(row, at): float(left[row, at] ** 2 / inverses[at][0, 0]) for row, at in places}
        for place in sorted(cost, key=cost.__getitem__)[:remove]:
            keep[place] = False

    for column in range(columns):
        if isinstance(pattern, NM):
            if column % pattern.m == 0:
                for row in range(rows):
                    choose([(row, at) for at in range(column, column + pattern.m)], pattern.m - pattern.n)
        elif isinstance(pattern, Unstructured) and column % block == 0:
            span = range(column, min(column + block, columns))
            if pattern.group == "row":
                remove = int(span.stop * pattern.fraction + 1e-9) - gone
                for row in range(rows):
                    choose([(row, at) for at in span], remove)
            else:
                remove = int(rows * span.stop * pattern.fraction + 1e-9) - gone
                choose([(row, at) for row in range(rows) for at in span], remove)
            gone += remove
        inverse = inverses[column]
        for row in range(rows):
            if not keep[row, column]:
                left[row, column:] -= left[row, column] / inverse[0, 0] * inverse[0]
                left[row, column] = 0.0
    return keep, left


PATTERNS = [
    NM(2, 4),
    NM(1, 4),
    NM(2, 8),
    NM(2, 3),
    Unstructured(0.5, "row"),
    Unstructured(0.5, "layer"),
    Unstructured(0.3, "row"),
    Unstructured(0.7, "layer"),
    Unstructured(1.0, "layer"),
]


@pytest.mark.parametrize("block", [7, 8, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_mask_and_weights_are_those_of_the_papers_loop(pattern: SparsityPattern, block: int) -> None:
    weight, stats = random_weight(), random_stats()
    keep, left = prune_slowly(weight, stats, pattern, block)
    pruned = SparseGPT(block=block).prune(weight, stats, pattern)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), left, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("column", [0, 1, 11, COLUMNS - 1])
def test_one_column_less_is_the_closed_form_of_optimal_brain_surgeon(column: int, block: int) -> None:
    weight, stats = random_weight(), random_stats()
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, column] = False
    inverse = torch.linalg.inv(damped(stats)[column:, column:])
    expected = weight.double().clone()
    expected[:, column:] -= torch.outer(expected[:, column] / inverse[0, 0], inverse[0])
    found = compensate(weight, keep, inverse_factor(stats).upper, block)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[:, :column], weight[:, :column])
    assert not raw(found[:, column]).any()


@pytest.mark.parametrize("block", [1, 5, 16, 128])
def test_block_size_does_not_matter_if_the_mask_is_given(block: int) -> None:
    weight, upper = random_weight(rows=300), inverse_factor(random_stats()).upper  # more rows than one core takes
    keep = random_weight(rows=300, seed=2) > 0
    before = raw(weight).clone()
    one_by_one = weight.clone()
    for column in range(COLUMNS):
        error = torch.where(keep[:, column], 0.0, one_by_one[:, column]) / upper[column, column]
        one_by_one[:, column:] -= torch.outer(error, upper[column, column:])
    found = compensate(weight, keep, upper, block)
    torch.testing.assert_close(found, one_by_one * keep, rtol=1e-4, atol=1e-4)
    assert not raw(found)[~keep].any()
    assert torch.equal(raw(weight), before)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5, "row")], ids=str)
def test_the_chosen_mask_given_leads_to_the_same_weights(pattern: SparsityPattern) -> None:
    weight, stats = random_weight(), random_stats()
    pruned = SparseGPT().prune(weight, stats, pattern)
    again = compensate(weight, pruned.keep, inverse_factor(stats).upper)
    torch.testing.assert_close(again, pruned.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", ["row", "layer"])
def test_independent_inputs_of_one_size_lead_to_magnitude_in_each_block(group: Any) -> None:
    weight, stats = random_weight(), InputStats(100, hessian=torch.eye(COLUMNS) * 3)
    pruned = SparseGPT(block=8).prune(weight, stats, Unstructured(0.5, group))
    expected = [Unstructured(0.5, group).keep(part.abs()) for part in weight.split(8, dim=1)]
    assert torch.equal(pruned.keep, torch.cat(expected, dim=1))
    assert torch.equal(pruned.weight, weight * pruned.keep)
    groups = SparseGPT().prune(weight, stats, NM(2, 4))
    assert torch.equal(groups.keep, NM(2, 4).keep(weight.abs()))


@pytest.mark.parametrize("block", [1, 3, 7, 16, 128])
@pytest.mark.parametrize("fraction", [0.07, 0.29, 0.5, 0.613, 0.99])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_counts_are_the_patterns_own_whatever_the_block(group: Any, fraction: float, block: int) -> None:
    pattern = Unstructured(fraction, group)
    keep = SparseGPT(block=block).prune(random_weight(), random_stats(), pattern).keep
    if group == "row":
        assert ((~keep).sum(1) == pattern.removed_of(COLUMNS)).all()
    assert int(keep.sum()) == int(pattern.keep(random_weight()).sum())


def test_ties_go_to_the_higher_column() -> None:
    weight, stats = torch.ones(3, 8), InputStats(100, hessian=torch.eye(8))
    for pattern in (NM(2, 4), Unstructured(0.25, "row")):
        assert torch.equal(SparseGPT().prune(weight, stats, pattern).keep, pattern.keep(weight))


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_nothing_removed_is_nothing_changed(fraction: float) -> None:
    weight = random_weight()
    if not fraction:
        weight[2] = -0.0
    pruned = SparseGPT().prune(weight, random_stats(), Unstructured(fraction, "row"))
    assert torch.equal(raw(pruned.weight), raw(weight))
    assert pruned.keep.all()
    assert pruned.notes["obs_loss"] == 0.0


def test_an_open_group_is_the_layer_as_in_the_paper() -> None:
    weight, stats = random_weight(), random_stats()
    found = SparseGPT().prune(weight, stats, Unstructured(0.5))
    assert torch.equal(found.keep, SparseGPT().prune(weight, stats, Unstructured(0.5, "layer")).keep)
    assert SparseGPT().group == "layer"


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5, "row"), Unstructured(0.7, "layer")], ids=str)
def test_the_layer_loses_less_than_by_choosing_alone(pattern: SparsityPattern) -> None:
    weight, stats = random_weight(48, 64), random_stats(64, 256)
    loss = {
        name: relative_error(weight, build(PRUNERS, name).prune(weight, stats, pattern).weight, stats)
        for name in ("sparsegpt", "wanda", "magnitude")
    }
    assert loss["sparsegpt"] < 0.8 * min(loss["wanda"], loss["magnitude"])


def test_fewer_tokens_than_inputs() -> None:
    weight, stats = random_weight(), random_stats(tokens=5)
    pruned = SparseGPT().prune(weight, stats, NM(2, 4))
    assert pruned.fallback is None
    assert pruned.weight.isfinite().all()
    masked = compensate(weight, pruned.keep, torch.eye(COLUMNS))
    assert relative_error(weight, pruned.weight, stats) < relative_error(weight, masked, stats)


def test_weights_of_dead_inputs_stay_by_magnitude_and_as_they_are() -> None:
    weight, hessian = random_weight(), random_stats().need("hessian").clone()
    hessian[8:12], hessian[:, 8:12] = 0.0, 0.0
    pruned = SparseGPT().prune(weight, InputStats(200, hessian=hessian), NM(2, 4))
    dead = weight[:, 8:12]
    assert torch.equal(pruned.keep[:, 8:12], NM(2, 4).keep(dead.abs()))
    assert torch.equal(pruned.weight[:, 8:12], dead * pruned.keep[:, 8:12])
    assert pruned.notes["dead_inputs"] == 4


def test_notes_hold_the_loss_of_all_steps() -> None:
    weight, stats = random_weight(), random_stats()
    pruned = SparseGPT(damping=0.02).prune(weight, stats, NM(2, 4))
    # With every column weighed as it goes, the steps' losses add up to that of the whole change under the damped H.
    change = (weight - pruned.weight).double()
    hessian = stats.need("hessian").double()
    hessian = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    expected = 0.5 * float(((change @ hessian) * change).sum())
    assert pruned.notes["obs_loss"] == pytest.approx(expected, rel=1e-4)
    assert pruned.notes["damp"] == 0.02
    assert pruned.notes["dead_inputs"] == 0


def test_more_damping_than_asked_for_is_a_fallback() -> None:
    stats = random_stats()
    values, vectors = torch.linalg.eigh(stats.need("hessian"))
    values[0] = -0.05 * float(values.mean())
    pruned = SparseGPT().prune(random_weight(), InputStats(9, hessian=(vectors * values) @ vectors.T), NM(2, 4))
    assert pruned.fallback == (
        "the Hessian has no Cholesky factor in float32 with damping 0.01; factored it in float32 with damping 0.1"
    )
    assert pruned.notes["damp"] == pytest.approx(0.1)
    assert pruned.weight.isfinite().all()


def test_linears_of_one_input_share_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = factor.factorize
    monkeypatch.setattr(factor, "factorize", lambda *args: made.append(args) or real(*args))
    stats = random_stats()
    for seed in range(3):
        SparseGPT().prune(random_weight(seed=seed), stats, NM(2, 4))
    assert len(made) == 1


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "layer")], ids=str)
def test_threads_do_not_change_a_bit(pattern: SparsityPattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "_ROWS", 16)
    weight, hessian = random_weight(rows=70), random_stats().need("hessian")
    expected = SparseGPT(block=8).prune(weight, InputStats(9, hessian=hessian), pattern)
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            found = SparseGPT(block=8).prune(weight.clone(), InputStats(9, hessian=hessian), pattern)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found.keep, expected.keep)
    assert torch.equal(raw(found.weight), raw(expected.weight))
    assert found.notes == expected.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "a block has at least one column"),
        ({"damping": 0.0}, "damping=0: give a share of the mean diagonal above 0"),
        ({"damping": float("nan")}, "damping=nan: give a share"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^pruner sparsegpt: option .*{message}"):
        build(PRUNERS, {"sparsegpt": options})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PatternError, match="24 inputs are not a multiple of 7"):
        SparseGPT().prune(random_weight(), random_stats(), NM(2, 7))
    with pytest.raises(CalibrationError, match="'hessian' was not collected"):
        SparseGPT().prune(random_weight(), InputStats(9), NM(2, 4))
