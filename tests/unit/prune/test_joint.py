"""SparseGPT that rounds in the same sweep, against the paper's algorithm in float64."""

import pytest
import torch
from torch import Tensor

from compressllm.core.layererror import relative_error
from compressllm.core.pattern import NM, SparsityPattern, parse_pattern
from compressllm.core.protocols import PRUNERS, QUANTIZERS
from compressllm.core.registry import build
from compressllm.core.scheme import Scheme, parse_scheme
from compressllm.core.stats import InputStats

COLUMNS = 64


def some(rows: int = 12) -> tuple[Tensor, InputStats]:
    torch.manual_seed(0)
    x = torch.randn(300, COLUMNS) @ (torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS))
    return torch.randn(rows, COLUMNS), InputStats(300, hessian=x.T @ x / 300)


def slowly(weight: Tensor, stats: InputStats, n: int, m: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Column by column, the inverse Hessian of what is left anew each time."""
    hessian = stats.need("hessian").double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    left, keep = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.bool)
    root = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0].sqrt() for c in range(COLUMNS)])
    group, scales = scheme.width(COLUMNS), torch.zeros(len(weight), dtype=torch.float64)

    def mask_of(row: int, start: int) -> list[int]:
        cost = {c: float(left[row, c].abs() / root[c]) for c in range(start, start + m)}
        return sorted(cost, key=cost.__getitem__)[m - n :]

    for column in range(COLUMNS):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(len(weight)):
            if column % m == 0:
                keep[row, mask_of(row, column)] = True
            if column % group == 0:
                stay = [c for start in range(column, column + group, m) for c in mask_of(row, start)]
                scales[row] = scheme.scale(left[row, stay].float()[None])[0].double()
            old = float(left[row, column])
            new = float(scheme.code(left[row, column].float(), scales[row].float())) * float(scales[row])
            new = new if keep[row, column] else 0.0
            left[row, column:] -= (old - new) * inverse[0] / inverse[0, 0]
            left[row, column] = new
    return keep, left


@pytest.mark.parametrize("scheme", ["int4-g32", "int8", "fp8"])
@pytest.mark.parametrize("block", [16, 128])
def test_prunes_and_rounds_as_the_paper_does(scheme: str, block: int) -> None:
    weight, stats = some()
    pruned = build(PRUNERS, {"sparsegpt": {"quantize": scheme, "block": block}}).prune(weight, stats, NM(2, 4))
    keep, left = slowly(weight, stats, 2, 4, parse_scheme(scheme))
    assert NM(2, 4).violations(pruned.keep) == 0
    assert (pruned.keep == keep).float().mean() > 0.98  # a rounding that falls the other way moves what is behind it
    assert torch.isclose(pruned.weight, left.float(), atol=1e-4).float().mean() > 0.95


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "0.5/row", "0.6/layer"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g128", "int8", "fp8"])
def test_what_is_left_lies_on_the_grid_that_rtn_finds(pattern: str, scheme: str) -> None:
    weight, stats = some()
    rule: SparsityPattern = parse_pattern(pattern)
    pruned = build(PRUNERS, {"sparsegpt": {"quantize": scheme}}).prune(weight, stats, rule)
    alone = build(PRUNERS, "sparsegpt").prune(weight, stats, rule)
    assert int(pruned.keep.sum()) == int(alone.keep.sum())
    assert not pruned.weight[~pruned.keep].any()
    found = build(QUANTIZERS, {"rtn": {"fit": True}}).quantize(pruned.weight, pruned.keep, stats, parse_scheme(scheme))
    assert torch.equal(found.weight.dequantize(torch.float32), pruned.weight)


def test_one_sweep_is_better_than_rounding_afterwards() -> None:
    weight, stats = some(64)
    joint = build(PRUNERS, {"sparsegpt": {"quantize": "int4-g32"}}).prune(weight, stats, NM(2, 4))
    pruned = build(PRUNERS, "sparsegpt").prune(weight, stats, NM(2, 4))
    after = build(QUANTIZERS, "rtn").quantize(pruned.weight, pruned.keep, stats, parse_scheme("int4-g32"))
    rounded = after.weight.dequantize(torch.float32)
    assert relative_error(weight, joint.weight, stats) < relative_error(weight, rounded, stats)
