import pytest
import torch

from compressllm.core.detect import KNOWN_PATTERNS, find_sparsity, pattern_of
from compressllm.core.pattern import NM, Unstructured, parse_pattern


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS, ids=str)
def test_finds_what_was_pruned(pattern):
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    keep = pattern.keep(weight.abs())
    found = find_sparsity(weight.masked_fill(~keep, 0))
    assert found is not None
    assert found[0] == pattern
    assert torch.equal(found[1], keep)


def test_short_groups_keep_their_first_zeros():
    weight = torch.zeros(1, 16)
    weight[0, 3] = 1.0  # one non-zero, then groups of none, one, and two
    weight[0, 8] = 1.0
    weight[0, [13, 14]] = 1.0
    pattern, keep = find_sparsity(torch.cat([weight, torch.randn(1, 16) * torch.tensor([1.0, 1.0, 0.0, 0.0] * 4)]))
    assert pattern == NM(2, 4)
    assert keep[0].view(4, 4).int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]


def test_an_empty_weight_takes_the_tightest_pattern():
    pattern, keep = find_sparsity(torch.zeros(2, 8))
    assert pattern == NM(1, 4)
    assert int(keep.sum()) == 4


@pytest.mark.parametrize("columns", [64, 37])
def test_unstructured(columns):
    torch.manual_seed(0)
    weight = torch.randn(16, columns)
    by_row, by_layer = (Unstructured(0.6, group).keep(weight.abs()) for group in ("row", "layer"))
    row, keep = find_sparsity(weight.masked_fill(~by_row, 0))
    assert torch.equal(keep, by_row)
    assert row.group == "row"
    layer, keep = find_sparsity(weight.masked_fill(~by_layer, 0))
    assert torch.equal(keep, by_layer)
    assert layer.group == "layer"
    assert layer.sparsity == pytest.approx(0.6, abs=0.01)


def test_dense_stays_dense():
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    assert find_sparsity(weight) is None
    weight[weight.abs() < 0.1] = 0  # 8 % of zeros: packing would hardly pay
    assert find_sparsity(weight) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_any_dtype(dtype):
    weight = (torch.randn(4, 16) * 8 + 20).to(dtype)
    keep = NM(2, 4).keep(weight.float())
    pattern, found = find_sparsity(torch.where(keep, weight.float(), 0).to(dtype))
    assert pattern == NM(2, 4)
    assert torch.equal(found, keep)


def test_the_pattern_of_a_mask_survives_being_written():
    torch.manual_seed(0)
    for rows, columns in [(7, 13), (3, 11), (64, 96)]:
        keep = torch.rand(rows, columns) < 0.37
        pattern = pattern_of(keep)
        assert parse_pattern(str(pattern)) == pattern
        assert pattern.violations(keep) == 0
