"""Rows of tensors on several processes."""

from typing import Any

import pytest
import torch

from compressllm.core.errors import RecipeError
from compressllm.core.launch import launched_ranks
from compressllm.core.pattern import NM
from compressllm.core.ranks import ALONE
from compressllm.recover.gradients import clip_
from compressllm.recover.masking import Adaptive, MaskedWeight
from compressllm.recover.sharding import FullyShared, Replicated, make_sharding


def test_uneven_rows_of_masks_are_masks_of_uneven_rows(launch: Any) -> None:
    """Ten rows on three processes lie as 4, 4 and 2; groups lie along the rows, so nothing else changes."""
    weight = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    keep = NM(2, 4).keep(weight.abs())

    def work(rank: int) -> Any:
        with launched_ranks() as ranks:
            sharding = FullyShared(ranks, torch.device("cpu"))
            rows = sharding.rows(weight).clone()
            one = MaskedWeight(torch.ones_like(rows, dtype=torch.bool), NM(2, 4))
            counts = Adaptive({"w": one}, lambda step: 0.0, 1, 1).refresh_({"w": rows}.__getitem__, 1)
            norm = clip_({"w": rows.clone()}, None, sharding.total_of_shards)
            masks = sharding.whole(one.keep, weight.shape)
            return len(rows), masks, sharding.whole(rows, weight.shape), norm, sharding.sum_over_shards(counts)

    told = launch(work, 3)
    assert [one[0] for one in told] == [4, 4, 2]
    for _, masks, whole, norm, counts in told:
        assert torch.equal(masks, keep)
        assert torch.equal(whole, weight)
        assert norm == pytest.approx(float(weight.norm()))
        assert (counts.weights, counts.kept_weights, counts.flipped) == (80, 40, 40)


def test_a_tensor_of_fewer_rows_than_processes(launch: Any) -> None:
    weight = torch.randn(2, 4)

    def work(rank: int) -> Any:
        with launched_ranks() as ranks:
            sharding = FullyShared(ranks, torch.device("cpu"))
            rows = sharding.rows(weight)
            return len(rows), sharding.whole(rows, weight.shape)

    told = launch(work, 3)
    assert [one[0] for one in told] == [1, 1, 0]
    assert all(torch.equal(one[1], weight) for one in told)


def test_one_process_cannot_be_sharded() -> None:
    with pytest.raises(RecipeError, match="needs several processes"):
        make_sharding("fsdp2", ALONE, torch.device("cpu"))
    assert isinstance(make_sharding("replicated", ALONE, torch.device("cpu")), Replicated)
