"""A flat map of clusters, to look at."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_map(coordinates: Tensor, seed: int, most: int = 1000) -> tuple[Tensor, Tensor]:
    """Some points and their places on a map: (m,) int64 indices and (m, 2) float32 in [0, 1].

    Near points stay near; how far apart far ones are says little.

    Source: van der Maaten and Hinton, t-SNE, 2008.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    drawn = torch.randperm(len(coordinates), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    points = coordinates[drawn]
    near = min(30.0, (len(points) - 1) / 3)
    embedding = TSNE(perplexity=near, init="pca", max_iter=500, random_state=seed)
    with threadpool_limits(1):  # its threads mostly wait for each other, and long where other work goes on
        flat = torch.from_numpy(embedding.fit_transform(points.numpy()))
    low, high = flat.amin(dim=0), flat.amax(dim=0)
    return drawn, ((flat - low) / (high - low).clamp_min(1e-9)).float()
