"""PASER: records of the capabilities that pruning hurt most."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import SELECTORS, Chosen, Embedder, RecordPool
from compressllm.core.run import Run
from compressllm.select.budget import share_budget
from compressllm.select.clustering import Clustering
from compressllm.select.embedders.auto import Auto
from compressllm.select.extra import sklearn_missing
from compressllm.select.phrases import candidates, key_phrases, typical_phrases
from compressllm.select.picking import pick


@SELECTORS.register("paser")
@dataclass(frozen=True)
class Paser:
    """Records of the capabilities that pruning hurt most, by how much each repairs for its length.

    Prompts are clustered by meaning; the Jensen-Shannon divergence between the dense and the pruned model's predictions
    of the responses says how damaged a cluster is and how much a record has to teach; a graph of concepts keeps out
    records that contradict the others. See docs/selecting-data.md.

    Args:
        embedder: What makes vectors of the prompts: a name from `compressllm list embedders`.
        neighbors: Edges of a prompt in the neighbour graph.
        min_clusters: Fewest clusters to consider.
        max_clusters: Most clusters to consider; the same number for both fixes it.
        landmarks: Prompts the graph is built on; the rest of a larger pool is placed among them.
        scored: Records of a cluster whose mean divergence stands for it.
        oversample: Records compared for each one to choose; 0 compares all.
        share: Budget of a cluster in proportion to the damage of all its records, which gives equally damaged clusters
            the same budget a record; or, as the paper has it, to its mean damage whatever its size.
        floor: Least share of the budget for any cluster.
        concepts: Whether to keep out records that contradict the others.
        seed: Of the clustering and of what is sampled; the command's or recipe's unless set here.

    Source: He et al., PASER, arXiv 2502.12594. Departures are named where they are.
    """

    embedder: Embedder = field(default_factory=Auto)
    neighbors: int = 30
    min_clusters: int = 5
    max_clusters: int = 30
    landmarks: int = 20_000
    scored: int = 256
    oversample: float = 3.0
    share: Literal["records", "clusters"] = "records"
    floor: float = 0.01
    concepts: bool = True
    seed: int = 0
    needs_student: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 2 <= self.min_clusters <= self.max_clusters:
            raise ValueError(f"min_clusters={self.min_clusters}: must be from 2 to max_clusters={self.max_clusters}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: must be from 0 to 1")
        if self.oversample and self.oversample < 1:
            raise ValueError(f"oversample={self.oversample}: must be 0, or at least 1")
        if least := [name for name in ("neighbors", "landmarks", "scored") if getattr(self, name) < 1]:
            raise ValueError(f"{least[0]}={getattr(self, least[0])}: must be at least 1")

    def select(self, pool: RecordPool, budget: int, run: Run) -> Chosen:
        """Choose, cluster by cluster in turn, the most efficient record that does not conflict."""
        if reason := sklearn_missing():
            raise RecipeError(f"selector paser {reason}")
        options = Clustering(self.neighbors, self.min_clusters, self.max_clusters, landmarks=self.landmarks)
        clusters = options.divide(pool.embeddings(self.embedder), self.seed, run)
        labels = torch.from_numpy(clusters.labels)
        generator = torch.Generator().manual_seed(self.seed)
        members: list[list[int]] = []  # of each cluster, in a random order
        for label in range(int(labels.max()) + 1):
            inside = (labels == label).nonzero().squeeze(1)
            members.append(inside[torch.randperm(len(inside), generator=generator)].tolist())

        sample = [ids[: self.scored] for ids in members]
        pool.divergence([one for ids in sample for one in ids])  # of all at once, then from memory
        damage = [float(pool.divergence(ids)[:, 0].double().mean()) for ids in sample]
        sizes = [len(ids) for ids in members]
        weights = [hurt * (size if self.share == "records" else 1) for hurt, size in zip(damage, sizes, strict=True)]
        counts = share_budget(budget, weights, sizes, self.floor)

        compared = [
            ids[: max(len(some), math.ceil(self.oversample * count)) if self.oversample else None]
            for ids, some, count in zip(members, sample, counts, strict=True)
        ]
        pool.divergence([one for ids in compared for one in ids])
        scores: dict[int, float] = {}
        for ids in compared:
            scores |= zip(ids, efficiency(pool.divergence(ids)[:, 0], pool.lengths[ids]).tolist(), strict=True)

        words = [candidates(prompt) for prompt in pool.prompts]
        best_first = [sorted(ids, key=lambda one: (-scores[one], one)) for ids in compared]
        phrases = key_phrases(words) if self.concepts else [[] for _ in words]
        picked = pick(best_first, counts, sizes, phrases)
        labels_of = labels.tolist()
        rows = [
            {
                "cluster": label,
                "records": sizes[label],
                "phrases": typical,
                "degradation": damage[label],
                "scored": len(sample[label]),
                "compared": len(compared[label]),
                "budget": counts[label],
                "budget_per_record": counts[label] / sizes[label],
                "rejected": picked.rejected[label],
                "readmitted": picked.readmitted[label],
                "examples": [pool.prompts[one][:200] for one in best_first[label][:3]],
            }
            for label, typical in enumerate(typical_phrases(words, labels_of))
        ]
        return Chosen(
            picked.ids,
            [scores[one] for one in picked.ids],
            [labels_of[one] for one in picked.ids],
            {
                "score": "Jensen-Shannon divergence, nats a response token, over the logarithm of the cost",
                "clustering": clusters.notes,
                "clusters": rows,
                "conflicts": picked.conflicts,
            },
            labels,
            torch.from_numpy(clusters.coordinates),
        )


def efficiency(divergence: Tensor, lengths: Tensor) -> Tensor:
    """(n,) divergence over the logarithm of the cost, which is the square of the length in tokens.

    Source: PASER's efficiency score. A record has a prompt and a response, so at least two tokens.
    """
    return divergence.double() / (2 * lengths.clamp_min(2).double().log())
