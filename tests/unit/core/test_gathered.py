"""N:M in an order of inputs."""

import pytest
import torch

from compressllm.core.errors import PatternError
from compressllm.core.gathered import Gathered, in_order_of
from compressllm.core.pattern import NM, SparsityPattern, Unstructured

ORDER = (3, 0, 7, 4, 1, 6, 2, 5)


def test_is_the_pattern_on_reordered_columns():
    pattern, scores = Gathered(NM(2, 4), ORDER), torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    keep = pattern.keep(scores)
    assert torch.equal(keep[:, list(ORDER)], NM(2, 4).keep(scores[:, list(ORDER)]))
    assert pattern.violations(keep) == 0
    assert NM(2, 4).violations(keep) > 0
    assert pattern.violations(torch.ones(64, 8, dtype=torch.bool)) == 128
    assert pattern.sparsity == 0.5
    assert isinstance(pattern, SparsityPattern)
    assert str(pattern) == "2:4 gathered"


def test_ordered_and_back_are_inverse():
    pattern, value = Gathered(NM(2, 4), ORDER), torch.arange(16.0).view(2, 8)
    assert pattern.ordered(value)[0].tolist() == list(map(float, ORDER))
    assert torch.equal(pattern.back(pattern.ordered(value)), value)
    assert Gathered.of(NM(2, 4), torch.tensor(ORDER)) == pattern == Gathered.of(NM(2, 4), ORDER)


def test_the_order_is_written_and_read():
    pattern = Gathered.of(NM(1, 4), torch.randperm(70_000, generator=torch.Generator().manual_seed(0)))
    assert Gathered.read(NM(1, 4), pattern.order_text) == pattern


@pytest.mark.parametrize("text", ["AQAAAA==", "AAAA", "no base64!", "AAAAAAAAAAA=", "AQAAAAIAAAA="])
def test_a_damaged_order_is_refused(text):
    with pytest.raises(PatternError, match="2:4 gathered: its order"):
        Gathered.read(NM(2, 4), text)


def test_shapes_that_do_not_fit():
    pattern = Gathered(NM(2, 4), ORDER)
    assert pattern.refuses((3, 8)) is None
    assert "12 inputs, and the order of 2:4 gathered is of 8" in str(pattern.refuses((3, 12)))
    with pytest.raises(PatternError, match="12 inputs"):
        pattern.keep(torch.ones(3, 12))
    with pytest.raises(PatternError, match="12 inputs"):
        pattern.violations(torch.ones(3, 12).bool())
    assert "not a multiple of 3" in str(Gathered(NM(1, 3), ORDER).refuses((3, 8)))


def test_what_is_asked_for_is_held_against_in_the_recorded_order():
    recorded = Gathered(NM(2, 4), ORDER)
    assert in_order_of(NM(4, 8), recorded) == Gathered(NM(4, 8), ORDER)
    assert in_order_of(Unstructured(0.5), recorded) == Unstructured(0.5)
    assert in_order_of(NM(2, 4), NM(1, 4)) == NM(2, 4) == in_order_of(NM(2, 4), None)
