"""Sums of ``x^T x``, of which only the lower triangle is computed."""

from __future__ import annotations

from torch import Tensor

_SLAB = 256  # rows at a time: small enough to leave out nearly half of the products, large enough to be quick


def add_gram_(total: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the lower triangle of ``total``, in place; above it, blocks on the diagonal are filled too.

    Each element is one dot product over the tokens of ``x``, so the sum does not depend on how the work is split
    over threads.

    Args:
        total: (in, in) float32.
        x: (tokens, in) float32.
    """
    columns = x.T
    for begin in range(0, x.shape[1], _SLAB):
        end = min(begin + _SLAB, x.shape[1])
        total[begin:end, :end].addmm_(columns[begin:end], x[:, :end])


def mirror_(total: Tensor) -> Tensor:
    """Copy the lower triangle of a square matrix over the upper one, in place, and return it."""
    for begin in range(0, total.shape[0], _SLAB):
        end = min(begin + _SLAB, total.shape[0])
        total[begin:end, end:] = total[end:, begin:end].T
        square = total[begin:end, begin:end]
        square.copy_(square.tril() + square.tril(-1).T)
    return total
