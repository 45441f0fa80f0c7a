"""The sparse neighbour graph of embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from compressllm.core.run import Run

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Rows of the similarity matrix that exist at once: 1024 x 20k float32 are 80 MB.
_ROWS: Final = 1024
# The neighbour whose distance is a point's own scale.
_SCALE: Final = 7


def nearest(points: Tensor, among: Tensor, k: int, run: Run, label: str, same: bool = False) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of ``among`` to each point, by cosine, nearest first; equally near ones in no fixed order.

    Args:
        points: (n, d) float32 of unit rows.
        among: (m, d) float32 of unit rows, m >= k, or m > k where ``same``.
        same: The two are the same, and no point is its own neighbour.

    Returns:
        (n, k) int64 indices and (n, k) float32 Euclidean distances. Memory is linear in n and m.
    """
    found, distances = torch.empty(len(points), k, dtype=torch.int64), torch.empty(len(points), k)
    starts = range(0, len(points), _ROWS)
    for start in run.track(starts, len(starts), label):
        cosine = points[start : start + _ROWS] @ among.T
        if same:
            cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        closest = cosine.topk(k)
        found[start : start + _ROWS] = closest.indices
        distances[start : start + _ROWS] = (2 - 2 * closest.values).clamp_min_(0).sqrt_()
    return found, distances


def own_scale(distances: Tensor) -> Tensor:
    """(n,) distance to the 7th neighbour, never zero: of many equal texts it is that of half the mean edge.

    Args:
        distances: (n, k) to the nearest neighbours, nearest first.
    """
    return distances[:, min(_SCALE, distances.shape[1]) - 1].clamp_min(float(distances.mean()) / 2 + 1e-6)


def affinity(found: Tensor, distances: Tensor, scale: Tensor) -> csr_array:
    """(n, n) symmetric float64 affinities exp(-d_ij^2 / (s_i s_j)) of points where either is a neighbour of the other.

    Args:
        found: (n, k) neighbours of each point, itself not among them.
        distances: (n, k), likewise.
        scale: (n,) of each point.

    Source: Zelnik-Manor and Perona, Self-Tuning Spectral Clustering, NeurIPS 2004, eq. 1.
    """
    from scipy.sparse import csr_array

    n, k = found.shape
    weights = torch.exp(-(distances.double() ** 2) / (scale.double()[:, None] * scale.double()[found]))
    rows = np.repeat(np.arange(n), k)
    one_way = csr_array((weights.numpy().ravel(), (rows, found.numpy().ravel())), shape=(n, n))
    return one_way.maximum(one_way.T).tocsr()
