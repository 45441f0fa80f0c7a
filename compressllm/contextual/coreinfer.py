"""CoreInfer: the neurons that are among a sentence's strongest most often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compressllm.contextual.clusters import kmeans
from compressllm.contextual.mlp import find_mlp
from compressllm.contextual.seen import inputs_of
from compressllm.core.errors import RecipeError
from compressllm.core.protocols import NEURON_SELECTORS, BlockPass, PromptScores

_STABLE_TOKENS = 128  # a core set stops moving after 200 to 300 tokens, and moves slowly before
_STABLE_OVERLAP = 0.85


@NEURON_SELECTORS.register("coreinfer")
@dataclass(frozen=True)
class CoreInfer:
    """One set a prompt: neurons often among a token's strongest, of the prompt or of calibration text like it.

    A token's core are the fraction ``alpha`` of its positive activations that are largest; a neuron scores the number
    of tokens in whose core it is. Guided by stability, those tokens are the prompt's. Guided by similarity, they are
    those of the cluster of calibration windows whose cores at the probed MLP are most like the prompt's.

    Args:
        alpha: Fraction of a token's positive activations in its core.
        guide: ``stability``, ``similarity``, or ``auto``: stability for a prompt of at least 128 tokens whose first
            half has 85 % of the same core set at the probed MLP, else similarity.
        probe: Where, as a fraction of the depth, sets are compared.

    Source: Wang et al., CoreInfer, arXiv 2410.18311, sections 3 and 4. Departures: the core is of each token's own
    positives, by down's input throughout, of all MLPs; ``auto`` is ours, there the user chooses.
    """

    alpha: float = 0.4
    guide: Literal["auto", "stability", "similarity"] = "auto"
    probe: float = 0.78
    level: ClassVar[Literal["prompt", "token", "input"]] = "prompt"

    def __post_init__(self) -> None:
        """Check the fractions."""
        if not 0 < self.alpha <= 1 or not 0 <= self.probe <= 1:
            raise ValueError(f"alpha {self.alpha} and probe {self.probe} are fractions; alpha is above 0")

    @property
    def calibrated(self) -> bool:
        """Unless it goes by stability alone."""
        return self.guide != "stability"

    def fit(self, blocks: Callable[[], Iterator[BlockPass]]) -> dict[str, Tensor]:
        """Clusters of windows: ``centroids`` (clusters, neurons) and ``scores.N`` (clusters, neurons) of each MLP."""
        if not self.calibrated:
            return {}
        counts = []  # of each MLP (windows, neurons)
        for block in blocks():
            down = find_mlp(block.module, block.name).down.module
            seen = [self.score(h) for batch in inputs_of(block, [down]) for h in batch[0]]
            counts.append(torch.stack(seen))
        probed = counts[self._probed(len(counts))]
        width = max(1, probed.shape[1] // 5)  # 3000 neurons of 14336 there
        groups, centroids = kmeans(_multi_hot(probed, width))
        scores = [
            torch.stack([one[groups == group].sum(0) for group in range(len(centroids))]).half().float()
            for one in (count / count.sum(1, keepdim=True).clamp_min(1) for count in counts)
        ]
        return {"centroids": centroids, **{f"scores.{index}": score for index, score in enumerate(scores)}}

    def score(self, h: Tensor) -> Tensor:
        """Number of tokens in whose core each neuron is."""
        h = h.float()
        size = (self.alpha * (h > 0).sum(-1, keepdim=True)).ceil().long()
        ordered = h.sort(dim=-1, descending=True).values
        cut = ordered.gather(-1, (size - 1).clamp_min(0))
        return ((h >= cut) & (h > 0)).float().sum(0)

    def choose(
        self, scores: Sequence[PromptScores], counts: Sequence[int], fitted: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """The prompt's counts, or its cluster's."""
        at = self._probed(len(scores))
        if self.guide == "stability" or (self.guide == "auto" and _stable(scores[at], counts[at])):
            return [one.total for one in scores]
        if "centroids" not in fitted or f"scores.{len(scores) - 1}" not in fitted:
            raise RecipeError("neuron selector coreinfer: its calibration is of another model; calibrate it anew")
        centroids = fitted["centroids"]
        mine = _multi_hot(scores[at].total[None].to(centroids.device), max(1, centroids.shape[1] // 5))
        nearest = int((torch.nn.functional.normalize(centroids) @ mine[0]).argmax())
        return [fitted[f"scores.{index}"][nearest].to(one.total.device) for index, one in enumerate(scores)]

    def _probed(self, depth: int) -> int:
        return min(depth - 1, round(self.probe * depth))


def _stable(scores: PromptScores, count: int) -> bool:
    if scores.tokens < _STABLE_TOKENS:
        return False
    half, whole = scores.first.topk(count).indices, scores.total.topk(count).indices
    return bool(torch.isin(half, whole).float().mean() >= _STABLE_OVERLAP)


def _multi_hot(counts: Tensor, width: int) -> Tensor:
    """(n, neurons): 1 for the ``width`` largest of each row."""
    order = counts.sort(dim=1, descending=True, stable=True).indices[:, :width]
    return torch.zeros_like(counts, dtype=torch.float32).scatter_(1, order, 1.0)
