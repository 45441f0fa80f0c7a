import pytest
import torch

from compressllm.core.errors import CalibrationError
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import PRUNERS
from compressllm.core.registry import build
from compressllm.core.stats import InputStats
from compressllm.prune.model import relative_error

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
