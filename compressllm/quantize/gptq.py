"""GPTQ: what each weight loses in rounding is made up for by those behind it in its row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError
from compressllm.core.factor import inverse_factor
from compressllm.core.protocols import QUANTIZERS, Quantized
from compressllm.core.quantized import QuantizedWeight, round_to_nearest
from compressllm.core.scheme import Scheme
from compressllm.core.stats import InputStats, Need


@QUANTIZERS.register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """Round column by column, and make up for each column's error by changing those behind it.

    A pruned weight has one code only, zero: what the columns before it would have it make up for counts as its error,
    and goes on to the columns behind. So all that is changed in the end are weights that the mask keeps.

    Args:
        order: ``activation`` takes columns of the largest inputs first, whose errors then have the most columns to be
            made up for in; scales are those of the weights as they came, and groups stay groups of neighbours, so that
            what is stored has the same form. ``natural`` takes columns as they come; a group's scale is that of its
            largest kept weight, as changed by the groups before.
        block: Columns finished before those behind the block are changed; moves last bits only.
        damping: Share of the mean diagonal that is added to the Hessian's diagonal.

    Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1; that zeros are one more rounding, from SparseGPT,
        arXiv 2301.00774, section 3.5; the order by size with scales set beforehand is the authors' code's act-order
        with static groups.
    """

    order: Literal["activation", "natural"] = "activation"
    block: int = 128
    damping: float = 0.01
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"option block={self.block}: a block has at least one column")
        if not 0.0 < self.damping < math.inf:
            raise ValueError(f"option damping={self.damping:g}: give a share of the mean diagonal above 0, as in 0.01")

    def quantize(self, weight: Tensor, keep: Tensor, stats: InputStats, scheme: Scheme) -> Quantized:
        """Quantise, changing what is kept to make up for what rounding loses.

        Raises: CalibrationError if the Hessian has no usable factor; FormatError if a scale is too large.
        """
        rows, columns = weight.shape
        group = scheme.width(columns)
        order = None if self.order == "natural" else _by_size(stats)
        factor = inverse_factor(stats if order is None else _ordered(stats, order), self.damping)
        block = self.block if group == columns else -(-self.block // group) * group  # no group lies in two blocks
        # Transposed, so that a column is one run of memory.
        left = weight.detach().T.clone(memory_format=torch.contiguous_format) if order is None else weight.T[order]
        pruned = ~(keep.T.contiguous() if order is None else keep.T[order])
        codes, scales = torch.empty_like(left), left.new_empty(-(-columns // group), rows)
        if order is not None:
            scales.copy_(round_to_nearest(weight, keep, scheme).scales.T)
        groups = ((torch.arange(columns) if order is None else order.cpu()) // group).tolist()
        loss = 0.0
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors = torch.empty_like(left[start:stop])
            for column in range(start, stop):
                if order is None and column % group == 0:
                    its = slice(column, column + group)
                    scales[column // group] = scheme.scale(left[its].masked_fill(pruned[its], 0.0).T)
                scale = scales[groups[column]]
                codes[column] = scheme.code(left[column], scale).masked_fill_(pruned[column], 0.0)
                error = errors[column - start]
                torch.sub(left[column], codes[column] * scale, out=error)
                error.div_(factor.upper[column, column])
                left[column + 1 : stop].addr_(factor.upper[column, column + 1 : stop], error, alpha=-1)
            left[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)
            loss += float(errors.square().sum()) / 2
        if not math.isfinite(loss):  # every change of a weight is in it
            raise CalibrationError("gptq: the changed weights are not finite; raise its option damping")
        if order is not None:
            codes = codes[order.argsort()]
        made = QuantizedWeight(
            codes.T.to(scheme.dtype, memory_format=torch.contiguous_format),
            scales.T.contiguous(),
            scheme.bits,
            group,
            weight.dtype,
            scheme.dynamic,
        )
        notes = {"obq_loss": loss, "damp": factor.damping, "dead_inputs": factor.dead}
        return Quantized(made, notes, factor.fallback)


def _by_size(stats: InputStats) -> Tensor:
    """(in,) int64: columns, those of the largest inputs first; made once for all linears that share these inputs."""
    return stats.derive("by size", lambda: stats.need("hessian").diagonal().argsort(descending=True, stable=True))


def _ordered(stats: InputStats, order: Tensor) -> InputStats:
    """Second moments of the same inputs in that order, made once likewise."""
    return stats.derive("in order", lambda: replace(stats, hessian=stats.need("hessian")[order][:, order]))
