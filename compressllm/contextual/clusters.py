"""K-means whose number of clusters the bend of its loss says."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST, _MOST, _ROUNDS = 4, 12, 50


def kmeans(points: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster of each point, and the centroids; the same every time.

    Between 4 and 12 clusters, as many as where the loss bends most; fewer points make a cluster each.

    Args:
        points: (n, d) float32.

    Returns: (n,) int64 and (k, d) float32; no cluster is empty.
    """
    most = min(_MOST, len({tuple(row) for row in points.tolist()}))
    tried = {k: _lloyd(points, k) for k in range(min(_FEWEST, most), most + 1)}
    sizes = list(tried)
    if len(sizes) < 3:
        return tried[sizes[0]][:2]
    losses = [tried[k][2] for k in sizes]
    bend = [losses[i - 1] - 2 * losses[i] + losses[i + 1] for i in range(1, len(sizes) - 1)]
    return tried[sizes[1 + max(range(len(bend)), key=bend.__getitem__)]][:2]


def _lloyd(points: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    chosen = [0]  # then always the point farthest from those chosen
    while len(chosen) < k:
        chosen.append(int(torch.cdist(points, points[chosen]).min(1).values.argmax()))
    centroids = points[chosen].clone()
    groups = torch.cdist(points, centroids).argmin(1)
    for _ in range(_ROUNDS):
        for group in range(k):
            if (groups == group).any():
                centroids[group] = points[groups == group].mean(0)
        before, groups = groups, torch.cdist(points, centroids).argmin(1)
        if torch.equal(before, groups):
            break
    filled = torch.bincount(groups, minlength=k).nonzero().view(-1)
    centroids, groups = centroids[filled], torch.searchsorted(filled, groups)
    return groups, centroids, float((points - centroids[groups]).square().sum())
