"""The diffusion map of a neighbour graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Array = npt.NDArray[np.float64]

# Share of each point's mean degree that leads to all points alike. Without it every few dozen near-equal texts that
# nothing else is near to are a component of their own, whose eigenvalue is 1 and crowds out those of the capabilities.
_ANYWHERE: Final = 0.05


@dataclass(frozen=True)
class DiffusionMap:
    """Coordinates in which near means that a random walk over the graph soon goes from one to the other.

    Args:
        eigenvalues: (c + 1,) float64 of the random walk, falling, the trivial 1 left out; one more than there are
            vectors, so that the gap after the last is known.
        vectors: (n, c) float64 right eigenvectors, of unit mean square under the walk's stationary distribution.
    """

    eigenvalues: Array
    vectors: Array

    def coordinates(self, vectors: Array, time: float) -> Array:
        """(m, c) of unit rows: the eigenvectors at some points, each times its eigenvalue to the power of ``time``.

        Without the unit rows a few dozen near-equal texts lie so far from all others that they are what is divided.

        Source: Ng, Jordan and Weiss, On spectral clustering, NeurIPS 2001, step 4.
        """
        scaled = vectors * np.clip(self.eigenvalues[:-1], 0, None) ** time
        unit: Array = scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
        return unit


def diffusion_map(affinities: csr_array, components: int, seed: int) -> DiffusionMap:
    """The leading non-trivial eigenvectors of the random walk D^-1 A, by way of the symmetric D^-1/2 A D^-1/2.

    The affinities are those given plus a small one between any two points, the same for all (regularised spectral
    clustering), which is never written out.

    Args:
        affinities: (n, n) symmetric, without negative entries.
        components: How many eigenvectors; at most n - 3.

    Source: Coifman and Lafon, Diffusion maps, 2006; Amini et al., Annals of Statistics 2013, section 2.2, for the
    small affinity; Dhillon et al., KDD 2004, for the relation between the two operators.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = affinities.shape[0]
    degree = affinities.sum(axis=1)
    anywhere = _ANYWHERE * float(degree.mean())  # spread over n points
    root = np.sqrt(degree + anywhere)

    def walk(x: Array) -> Array:
        scaled = x.ravel() / root
        moved: Array = (affinities @ scaled + anywhere / n * scaled.sum()) / root
        return moved

    operator: Any = LinearOperator((n, n), matvec=walk, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(n)
    values, vectors = eigsh(operator, k=components + 2, which="LA", v0=start)
    falling = np.argsort(-values)[1:]  # the first is the stationary one
    kept = vectors[:, falling[:-1]] / root[:, None] * np.sqrt(root @ root)
    return DiffusionMap(values[falling], kept * _signs(kept))


def _signs(vectors: Array) -> Array:
    """What makes each column's largest entry positive, since an eigenvector's sign is arbitrary."""
    signs: Array = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    return signs


def extend(diffusion: DiffusionMap, found: Tensor, weights: Tensor) -> Array:
    """(r, c) eigenvectors at points outside the graph, by their neighbours in it (Nystrom).

    Args:
        found: (r, k) indices of the neighbours.
        weights: (r, k) affinities to them.
    """
    shares = (weights / weights.sum(dim=1, keepdim=True)).double()
    vectors = torch.from_numpy(diffusion.vectors)
    mean = torch.zeros(len(found), vectors.shape[1], dtype=torch.float64)
    for column in range(found.shape[1]):  # no (r, k, c) tensor
        mean += shares[:, column, None] * vectors[found[:, column]]
    return np.asarray(mean.numpy() / np.clip(diffusion.eigenvalues[:-1], 0.1, None))
