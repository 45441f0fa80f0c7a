"""The error that a changed weight makes in a linear's output."""

from __future__ import annotations

from torch import Tensor

from compressllm.core.stats import InputStats

_ERROR_ROWS = 256  # of which the error is taken: of all, that would cost more than the solvers


def error_rows(matrix: Tensor) -> Tensor:
    """The at most 256 rows, spread evenly, that `relative_error` looks at; all of so few are themselves."""
    return matrix[:: -(-matrix.shape[0] // _ERROR_ROWS)]


def relative_error(weight: Tensor, changed: Tensor, stats: InputStats) -> float:
    """Squared output error over squared output, ``tr(D G D^T) / tr(W G W^T)``, of at most 256 rows spread evenly.

    With mean squares alone, G is taken as diagonal; with no statistics, as the identity. All (out, in) float32.
    """
    weight, changed = error_rows(weight), error_rows(changed)

    def energy(matrix: Tensor) -> float:
        if stats.hessian is not None:
            return float(((matrix @ stats.hessian) * matrix).sum())
        squares = matrix.square()
        return float((squares @ stats.sqnorm).sum() if stats.sqnorm is not None else squares.sum())

    whole = energy(weight)
    return energy(weight - changed) / whole if whole else 0.0
