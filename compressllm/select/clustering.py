"""Clusters of prompts: capabilities that no one has labelled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compressllm.core.run import Run
from compressllm.select.diffusion import Array, diffusion_map, extend
from compressllm.select.neighbours import affinity, nearest, own_scale

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Eigenvectors that a map has at least. What it is divided into is another question.
_VECTORS: Final = 29
# Points whose affinities are factored; more take longer than all the rest.
_FACTORED: Final = 5000
#: Records per cluster below which there is nothing to learn from a finer division.
_FEWEST: Final = 10
# Gaps at least this near to the largest are taken for equal to it.
_TIE: Final = 0.8


@dataclass(frozen=True)
class Clusters:
    """A division of points into clusters 0, 1, …, the largest first.

    Args:
        labels: (n,) int64 cluster of each point.
        coordinates: (n, c) float64 diffusion coordinates, in which the clusters were found.
        notes: How their number was chosen, as plain data.
    """

    labels: npt.NDArray[np.int64]
    coordinates: Array
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Clustering:
    """How to divide points.

    Args:
        neighbors: Edges of a point in the graph.
        fewest: Least number of clusters.
        most: Largest number of clusters.
        time: Steps of the random walk that the diffusion map is of. They, and no cut, say how far the lesser
            eigenvectors count: the usual K - 1 make worse clusters of real prompts. From 4 to 16 little changes.
        landmarks: Points the graph is built on, drawn at random if there are more; the others take their places
            among the landmarks' from their neighbours, so that time and memory are linear in their number.
    """

    neighbors: int = 30
    fewest: int = 5
    most: int = 30
    time: float = 8.0
    landmarks: int = 20_000

    def divide(self, points: Tensor, seed: int, run: Run) -> Clusters:
        """Clusters of (n, d) float32 unit rows."""
        from sklearn.cluster import KMeans

        most = min(self.most, len(points) // _FEWEST)
        if most < 2:
            return Clusters(np.zeros(len(points), np.int64), np.zeros((len(points), 1)), {"clusters": 1})
        drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[: self.landmarks]
        marks = points[drawn := drawn.sort().values]
        k = min(self.neighbors, len(marks) - 1)
        found, distances = nearest(marks, marks, k, run, "neighbours", same=True)
        scale = own_scale(distances)
        graph = affinity(found, distances, scale)
        walk = diffusion_map(graph, min(max(_VECTORS, most - 1), len(marks) // 2), seed)
        count, notes = _choose_count(walk.eigenvalues, graph, min(self.fewest, most), most, seed)
        coordinates = walk.coordinates(walk.vectors, self.time)
        means = KMeans(count, n_init=10, random_state=seed).fit(coordinates)
        labels = means.labels_.astype(np.int64)
        if len(drawn) < len(points):
            placed = np.empty((len(points), coordinates.shape[1]))
            placed[drawn.numpy()] = coordinates
            others = torch.ones(len(points), dtype=torch.bool).index_fill_(0, drawn, False).nonzero().squeeze(1)
            near, far = nearest(points[others], marks, k, run, "placing the rest")
            weights = torch.exp(-(far**2) / (own_scale(far)[:, None] * scale[near]))
            placed[others.numpy()] = walk.coordinates(extend(walk, near, weights), self.time)
            coordinates, labels = placed, means.predict(placed).astype(np.int64)
        notes |= {"landmarks": len(drawn), "neighbors": k}
        return Clusters(_largest_first(labels), coordinates, notes)


def _choose_count(
    eigenvalues: Array, graph: csr_array, fewest: int, most: int, seed: int
) -> tuple[int, dict[str, Any]]:
    """The number of clusters after which the eigenvalues fall most, and what speaks for it.

    Among falls that are as good as equal, the number with the sharpest bend in the error of a factorisation of the
    affinities into so many non-negative parts.
    """
    counts = range(fewest, most + 1)
    # K clusters are K eigenvalues near 1. The first, the trivial one, is not in the list.
    gaps = {count: float(eigenvalues[count - 2] - eigenvalues[count - 1]) for count in counts}
    largest = max(gaps.values())
    tied = [count for count in counts if gaps[count] >= _TIE * largest]
    notes: dict[str, Any] = {"gaps": {count: round(gap, 6) for count, gap in gaps.items()}, "tied": tied}
    chosen = tied[0]
    if len(tied) > 1:
        errors = _factor_errors(graph, sorted({c + step for c in tied for step in (-1, 0, 1)}), seed)
        bend = {count: errors[count - 1] - 2 * errors[count] + errors[count + 1] for count in tied}
        chosen = max(tied, key=lambda count: (bend[count], -count))
        notes["factor_errors"] = {count: round(error, 6) for count, error in errors.items()}
    return chosen, {"clusters": chosen, **notes}


def _factor_errors(graph: csr_array, counts: list[int], seed: int) -> dict[int, float]:
    """Relative error ||A - W H|| / ||A|| of some of the affinities' non-negative factorisation of each rank."""
    import warnings

    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    if graph.shape[0] > _FACTORED:
        drawn = np.sort(np.random.default_rng(seed).choice(graph.shape[0], _FACTORED, replace=False))
        graph = graph[drawn][:, drawn]
    norm = float(np.sqrt(graph.power(2).sum()))
    errors = {}
    for count in counts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an error that still falls a little will do
            factors = NMF(count, init="nndsvda", max_iter=30, random_state=seed).fit(graph)
        errors[count] = float(factors.reconstruction_err_) / norm
    return errors


def _largest_first(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same division with its clusters numbered by size, those of one size by their first point; none is empty."""
    names, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    number = np.empty(int(names.max()) + 1, np.int64)
    number[names[order]] = np.arange(len(names))
    return number[labels]
