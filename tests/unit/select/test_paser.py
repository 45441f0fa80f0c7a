import json
from typing import Any

import pytest
import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import SELECTORS, Embedder
from compressllm.core.registry import build
from compressllm.core.run import Run

pytest.importorskip("sklearn", reason="clustering needs scikit-learn: pip install scikit-learn scipy")

from sklearn.metrics import adjusted_rand_score

from compressllm.select.paser import Paser, efficiency

WORDS = {0: "python loop", 1: "apple harvest", 2: "railway bridge", 3: "violin concerto", 4: "glacier valley"}
SIZES = [200, 160, 120, 80, 60]
DAMAGED = 2


class PlantedPool:
    """Clusters of prompts, one of which the pruned model answers much worse than the others."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        centres = torch.nn.functional.normalize(torch.randn(len(SIZES), 24, generator=generator))
        truth = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
        self.truth = truth[torch.randperm(len(truth), generator=generator)]
        noise = 0.12 * torch.randn(len(truth), 24, generator=generator)
        self.points = torch.nn.functional.normalize(centres[self.truth] + noise)
        self.prompts = [f"Tell me of the {WORDS[one]}." for one in self.truth.tolist()]
        self.response_lengths = torch.randint(2, 60, (len(truth),), generator=generator)
        self.lengths = self.response_lengths + torch.randint(5, 60, (len(truth),), generator=generator)
        self.jsd = torch.rand(len(truth), generator=generator) * 0.1 + 0.2 * (self.truth == DAMAGED)
        self.asked: set[int] = set()

    def divergence(self, ids: Any) -> Tensor:
        self.asked |= set(ids)
        return torch.stack([self.jsd[list(ids)]] * 2, dim=1)

    def embeddings(self, embedder: Embedder) -> Tensor:
        return self.points


@pytest.mark.parametrize("share", ["records", "clusters"])
def test_the_damaged_cluster_gets_the_largest_budget_a_record(share: Any) -> None:
    pool = PlantedPool()
    chosen = Paser(share=share).select(pool, 100, Run())
    assert chosen.labels is not None
    assert chosen.clusters is not None
    assert adjusted_rand_score(pool.truth, chosen.labels) > 0.9
    assert len(chosen.ids) == len(set(chosen.ids)) == 100
    assert chosen.clusters == [int(chosen.labels[one]) for one in chosen.ids]
    rows = chosen.notes["clusters"]
    json.dumps(chosen.notes)
    assert sum(row["budget"] for row in rows) == 100
    worst = max(rows, key=lambda row: row["degradation"])
    assert "railway bridge" in worst["phrases"]
    if share == "records":
        assert worst is max(rows, key=lambda row: row["budget_per_record"])
        assert worst["budget_per_record"] > 2 * min(row["budget_per_record"] for row in rows)
    else:  # the paper's: the largest budget, whatever the size
        assert worst is max(rows, key=lambda row: row["budget"])
    for row in rows:
        assert row["budget"] == chosen.clusters.count(row["cluster"]) >= 1
        assert row["records"] == int((chosen.labels == row["cluster"]).sum())


def test_the_best_records_of_each_cluster_are_taken() -> None:
    pool = PlantedPool()
    chosen = Paser(oversample=0, concepts=False).select(pool, 100, Run())
    assert chosen.labels is not None
    scores = pool.jsd.double() / torch.log(pool.lengths.double() ** 2)
    for row in chosen.notes["clusters"]:
        inside = (chosen.labels == row["cluster"]).nonzero().squeeze(1)
        best = inside[scores[inside].argsort(descending=True)[: row["budget"]]].tolist()
        own = [one for one in chosen.ids if chosen.labels[one] == row["cluster"]]
        assert own == best
    torch.testing.assert_close(torch.tensor(chosen.scores).double(), scores[chosen.ids], rtol=1e-5, atol=0)
    assert len(set(chosen.clusters[:5])) == 5, "clusters take turns"  # type: ignore[index]


def test_is_deterministic_and_follows_the_seed() -> None:
    first, again, other = (
        Paser(seed=seed, scored=20, oversample=1).select(PlantedPool(), 60, Run()) for seed in (0, 0, 1)
    )
    assert first.ids == again.ids
    assert first.ids != other.ids


def test_compares_no_more_records_than_it_must() -> None:
    pool = PlantedPool()
    chosen = Paser(scored=10, oversample=2).select(pool, 50, Run())
    rows = chosen.notes["clusters"]
    assert len(pool.asked) == sum(row["compared"] for row in rows)
    for row in rows:
        assert row["scored"] == 10
        assert row["compared"] == min(row["records"], max(10, 2 * row["budget"]))


def test_conflicting_records_are_passed_over_and_counted() -> None:
    pool = PlantedPool()
    things = [f"thing{chr(97 + one)}" for one in range(20)]
    draw = torch.randint(0, 20, (len(pool.prompts), 2), generator=torch.Generator().manual_seed(0)).tolist()
    pool.prompts = [f"the {things[a]} of the {things[b]}" for a, b in draw]
    kept = Paser().select(pool, 100, Run())  # every phrase is in more than a hundredth of the prompts
    assert sum(row["rejected"] for row in kept.notes["clusters"]) == 0
    rare = [
        f"the {things[a]}{chr(97 + at % 26)} of the {things[b]}{chr(97 + at // 26)}" for at, (a, b) in enumerate(draw)
    ]
    pool.prompts = rare
    chosen = Paser().select(pool, 100, Run())
    assert sum(row["rejected"] for row in chosen.notes["clusters"]) > 0
    assert chosen.notes["conflicts"]
    assert len(set(chosen.ids)) == 100


def test_efficiency_is_divergence_over_the_logarithm_of_squared_length() -> None:
    found = efficiency(torch.tensor([0.3, 0.3]), torch.tensor([10, 1]))
    assert found.tolist() == pytest.approx([0.3 / 4.605170186, 0.3 / 1.386294361])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_clusters": 1}, "min_clusters=1"),
        ({"min_clusters": 9, "max_clusters": 8}, "min_clusters=9"),
        ({"floor": 2.0}, "floor"),
        ({"oversample": 0.5}, "oversample"),
        ({"scored": 0}, "scored=0"),
        ({"embedder": "mini"}, "minilm"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(SELECTORS, {"paser": options})
