"""Every selector: exact budget, no record twice, the same choice again."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from compressllm.core.protocols import EMBEDDERS, SELECTORS, Embedder
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.select.extra import sklearn_missing


class AnyPool:
    """Random records, some of them equal in every respect."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.prompts = [f"Tell of the {('sea', 'moon', 'desert')[one % 3]}, {one}." for one in range(count)]
        self.response_lengths = torch.randint(1, 5, (count,), generator=generator)
        self.lengths = self.response_lengths + 4
        self.values = torch.randint(0, 4, (count, 2), generator=generator) / 8
        self.points = torch.nn.functional.normalize(torch.randn(count, 8, generator=generator))

    def divergence(self, ids: Any) -> Tensor:
        return self.values[list(ids)]

    def embeddings(self, embedder: Embedder) -> Tensor:
        return self.points


@pytest.mark.parametrize("name", SELECTORS.names())
@pytest.mark.parametrize(("count", "budget"), [(1, 1), (15, 4), (90, 1), (90, 30), (90, 90)])
def test_selector_keeps_its_contract(name: str, count: int, budget: int) -> None:
    if name == "paser" and (reason := sklearn_missing()):
        pytest.skip(f"paser {reason}")
    first, again = (build(SELECTORS, name, {"seed": 5}).select(AnyPool(count), budget, Run()) for _ in range(2))
    assert len(first.ids) == len(set(first.ids)) == len(first.scores) == budget
    assert all(0 <= one < count for one in first.ids)
    assert list(first.ids) == list(again.ids)
    assert list(first.scores) == list(again.scores)
    assert "score" in first.notes
    json.dumps(first.notes)
    if first.clusters is not None:
        assert first.labels is not None
        assert first.coordinates is not None
        assert list(first.clusters) == [int(first.labels[one]) for one in first.ids]
        assert len(first.labels) == len(first.coordinates) == count
    if name == "longest":
        lengths = AnyPool(count).response_lengths
        assert first.scores == sorted(lengths.tolist(), reverse=True)[:budget]
    if name == "kd-gap":
        assert first.scores == sorted(AnyPool(count).values[:, 1].tolist(), reverse=True)[:budget]


def test_registries_are_not_empty() -> None:
    assert {"paser", "random", "longest", "kd-gap"} <= set(SELECTORS.names())
    assert {"auto", "minilm", "hidden", "tfidf", "sentence-transformers"} <= set(EMBEDDERS.names())


def test_random_follows_its_seed() -> None:
    one, other = (build(SELECTORS, "random", {"seed": seed}).select(AnyPool(90), 30, Run()).ids for seed in (0, 1))
    assert one != other
