import pytest
import torch

from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.core.layererror import relative_error
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS
from compressllm.core.registry import build
from compressllm.core.stats import InputStats, StatsAccumulator

NOTHING = InputStats(tokens=0)


def random_weight(seed: int = 0, rows: int = 6, columns: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_magnitude_keeps_the_largest_of_the_whole_matrix() -> None:
    weight = random_weight()
    pruned = build(PRUNERS, "magnitude").prune(weight, NOTHING, Unstructured(0.5, "layer"))
    largest = sorted((abs(value) for value in weight.flatten().tolist()), reverse=True)[:72]
    assert pruned.keep.tolist() == [[abs(value) in largest for value in row] for row in weight.tolist()]
    assert torch.equal(pruned.weight, weight * pruned.keep)
    assert build(PRUNERS, "magnitude").group == "layer"


def test_wanda_weighs_by_the_size_of_inputs() -> None:
    weight, x = random_weight(), random_weight(seed=1, rows=50) * torch.linspace(0.1, 9.0, 24)
    stats = InputStats(tokens=50, sqnorm=x.square().mean(0))
    keep = build(PRUNERS, "wanda").prune(weight, stats, NM(2, 4)).keep
    norms = [sum(value**2 for value in column) ** 0.5 for column in x.T.tolist()]
    for row, kept in zip(weight.tolist(), keep.tolist(), strict=True):
        for at in range(0, 24, 4):
            scores = {column: abs(row[column]) * norms[column] for column in range(at, at + 4)}
            best = sorted(scores, key=scores.__getitem__)[2:]
            assert {column for column in range(at, at + 4) if kept[column]} == set(best)
    assert build(PRUNERS, "wanda").group == "row"


def test_wanda_without_statistics_says_so() -> None:
    with pytest.raises(CalibrationError, match="'sqnorm' was not collected"):
        build(PRUNERS, "wanda").prune(random_weight(), NOTHING, NM(2, 4))


@pytest.mark.parametrize("power", [0.5, 0.0, 1.0])
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), Unstructured(0.5, "row"), NM(2, 4)], ids=str)
def test_ria_weighs_shares_of_rows_and_columns(power: float, pattern: SparsityPattern) -> None:
    weight, x = random_weight(), random_weight(seed=1, rows=50) * torch.linspace(0.1, 9.0, 24)
    weight[2], weight[:, 5], weight[4] = 0.0, 0.0, weight[4] * 1e-3  # empty, and thin
    stats = InputStats(tokens=50, sqnorm=x.square().mean(0))
    keep = build(PRUNERS, {"ria": {"power": power}}).prune(weight, stats, pattern).keep
    norms = [sum(value**2 for value in column) ** 0.5 for column in x.T.tolist()]
    size = [[abs(value) for value in row] for row in weight.tolist()]
    score = torch.zeros(6, 24, dtype=torch.float64)
    for i, row in enumerate(size):
        for j, value in enumerate(row):
            if value:
                score[i, j] = (value / sum(other[j] for other in size) + value / sum(row)) * norms[j] ** power
    assert torch.equal(keep, pattern.keep(score))
    assert build(PRUNERS, "ria").group == "layer"


def test_ria_spares_thin_columns() -> None:
    weight = random_weight()
    weight[:, 4] *= 1e-3
    stats = InputStats(tokens=1, sqnorm=torch.ones(24))
    kept = {
        name: int(build(PRUNERS, name).prune(weight, stats, Unstructured(0.5, "layer")).keep[:, 4].sum())
        for name in ("magnitude", "ria")
    }
    assert kept["magnitude"] == 0
    assert kept["ria"] >= 2


def test_ria_refuses_a_negative_power() -> None:
    with pytest.raises(RecipeError, match=r"^pruner ria: power -0\.5 is negative"):
        build(PRUNERS, {"ria": {"power": -0.5}})


@pytest.mark.parametrize("method", ["ria", "dsnot"])
def test_the_number_of_threads_changes_no_mask(method: str) -> None:
    weight = random_weight(rows=257, columns=516)
    stats = StatsAccumulator(frozenset({"mean", "var", "sqnorm"}))
    stats.add_(random_weight(seed=1, rows=64, columns=516) + 0.5)
    seen = stats.finish("layer")
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(build(PRUNERS, method).prune(weight, seen, Unstructured(0.5)).keep)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*found)


def test_random_depends_on_the_seed_and_the_matrix_and_nothing_else() -> None:
    def keep(seed: int, weight: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 2**31)  # the global generator is not used
        return build(PRUNERS, {"random": {"seed": seed}}).prune(weight, NOTHING, NM(2, 4)).keep

    weight = random_weight()
    assert torch.equal(keep(0, weight), keep(0, weight.clone()))
    assert not torch.equal(keep(0, weight), keep(1, weight))
    assert not torch.equal(keep(0, weight), keep(0, random_weight(seed=1)))
    assert torch.equal(build(PRUNERS, "random", {"seed": 1}).prune(weight, NOTHING, NM(2, 4)).keep, keep(1, weight))


def test_random_is_fair() -> None:
    weight = torch.arange(400.0 * 4).view(400, 4)
    kept = build(PRUNERS, "random").prune(weight, NOTHING, NM(2, 4)).keep.sum(0)
    assert ((kept > 160) & (kept < 240)).all()  # four standard deviations around 200


@pytest.mark.parametrize("statistic", ["hessian", "sqnorm", None])
def test_relative_error_is_squared_output_error_over_squared_output(statistic: str | None) -> None:
    weight, keep = random_weight(), random_weight(seed=2) > 0
    x = torch.eye(24) if statistic is None else random_weight(seed=1, rows=50)
    if statistic == "sqnorm":
        x = torch.diag(x.square().mean(0).sqrt())  # uncorrelated inputs of the same size
    gram = x.T @ x / len(x)
    stats = {"hessian": {"hessian": gram}, "sqnorm": {"sqnorm": gram.diagonal() * 24}, None: {}}[statistic]
    expected = ((weight - weight * keep) @ x.T).square().sum() / (weight @ x.T).square().sum()
    found = relative_error(weight, weight * keep, InputStats(tokens=50, **stats))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_relative_error_of_nothing() -> None:
    weight = random_weight()
    assert relative_error(weight, weight, NOTHING) == 0.0
    assert relative_error(weight, torch.zeros_like(weight), NOTHING) == 1.0
    assert relative_error(torch.zeros(2, 4), torch.zeros(2, 4), NOTHING) == 0.0
