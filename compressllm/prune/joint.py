"""SparseGPT's sweep that prunes and rounds at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressllm.core.scheme import Scheme

#: From the (out, width) scores of some columns, and the first of them, to their bool mask: True = kept.
Choose = Callable[[Tensor, int], Tensor]


def quantizing_sweep(
    weight: Tensor, upper: Tensor, block: int, width: int, choose: Choose, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    """Go over the columns of an (out, in) weight once: choose what stays of ``width`` of them, and round it.

    A pruned weight is one more rounding, to zero; the error of either goes to the columns behind. A group's scale is
    that of the largest weight which would stay if all of its columns were chosen at its first.

    Args:
        upper: (in, in) factor of the inverse Hessian.
        block: Columns finished before those behind the block are changed; a multiple of ``width``.

    Returns: (out, in) bool mask; (out, in) weight, codes times scales; (out,) losses, half the squared errors' sums.

    Raises: FormatError if a scale is too large for float16.
    """
    columns = weight.shape[1]
    group = scheme.width(columns)
    left = weight.detach().T.clone(memory_format=torch.contiguous_format)  # so that a column is one run of memory
    keep = torch.empty_like(left, dtype=torch.bool)
    losses, scale = torch.zeros_like(left[0]), torch.zeros_like(left[0])
    size = upper.diagonal()[:, None]

    def chosen(start: int, stop: int) -> Tensor:
        parts = [slice(at, min(at + width, stop)) for at in range(start, stop, width)]
        return torch.cat([choose((left[part].abs() / size[part]).T, part.start).T for part in parts])

    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            if column % width == 0:
                keep[column : column + width] = chosen(column, min(column + width, columns))
            if column % group == 0:
                end, known = min(column + group, columns), min((column // width + 1) * width, columns)
                ahead = chosen(known, min(-(-end // width) * width, columns)) if known < end else keep[:0]
                would = torch.cat([keep[column:known], ahead])[: end - column]
                scale = scheme.scale(left[column:end].masked_fill(~would, 0.0).T)
            rounded = (scheme.code(left[column], scale) * scale).masked_fill_(~keep[column], 0.0)
            error = (left[column] - rounded).div_(upper[column, column])
            left[column] = rounded
            left[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        left[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)
        losses.add_(errors.square().sum(0), alpha=0.5)
    return keep.T.contiguous(), left.masked_fill_(~keep, 0.0).T.contiguous(), losses
