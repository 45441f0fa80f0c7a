"""AWQ's scales: inputs that are large get weights that are large, which rounding hurts less."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressllm.calibration.walker import Block
from compressllm.core.layererror import error_rows, relative_error
from compressllm.core.masks import MaskStore
from compressllm.core.protocols import QUANTIZERS, Quantized, Quantizer
from compressllm.core.quantized import round_to_nearest
from compressllm.core.scheme import Scheme
from compressllm.core.stats import InputStats, Need
from compressllm.models.weights import Weights
from compressllm.quantize.folds import Fold, Folds
from compressllm.quantize.rtn import RTN

_SAME = 0.05  # of what a block adds to its input: rounding to bfloat16 changes half a percent, a wrong fold most of it


@QUANTIZERS.register("awq-scale")
@dataclass(frozen=True)
class AWQScale:
    """Scale up the weights of large inputs before rounding, where what makes the inputs can be scaled down for free.

    Column j of all linears that share their inputs is multiplied by s_j = size(X_j)^a over the geometric mean of the
    largest and the smallest, and what makes the inputs is divided by it: the norm before, the values before the output
    projection, the up projection before the down projection. Of ``grid`` steps from a = 0, no scale, to 1 the one is
    taken whose rounded weights change the outputs least. A linear whose inputs nothing can take scales of is rounded
    without, and its row says why; so is one whose block measurably computes something else with them.

    The size of an input is its root mean square, the paper's is the mean magnitude. The error is that of the linear's
    own outputs, the authors' code takes that of the block. A norm's weight is rounded to its dtype first, and columns
    are multiplied by what that rounding left to be made up for.

    Args:
        grid: Steps of the search.
        then: What rounds the scaled weights.

    Source: Lin et al., AWQ, arXiv 2306.00978, section 3.2, equations 4 and 5.
    """

    grid: int = 20
    then: Quantizer = field(default_factory=RTN)
    reads: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"option grid={self.grid}: a search has at least one step")

    @property
    def needs(self) -> frozenset[Need]:
        """The Hessian, and what the quantizer behind it reads."""
        return self.reads | self.then.needs

    def quantize(self, weight: Tensor, keep: Tensor, stats: InputStats, scheme: Scheme) -> Quantized:
        """Round weights that `rescale_` has scaled, if it could."""
        return self.then.quantize(weight, keep, stats, scheme)

    def rescale_(
        self,
        block: Block,
        names: Collection[str],
        folds: Folds,
        masks: MaskStore,
        scheme: Scheme,
        order: Callable[[str], Tensor | None],
        weights: Weights,
        stats: dict[str, InputStats],
    ) -> dict[str, dict[str, Any]]:
        """Scale what can be scaled. Changes the block's weights, and in ``stats`` what was seen of their inputs.

        Args:
            names: The linears of the block that are to be quantised.
            order: Gives the order of inputs that a linear's groups are to lie in.

        Returns: Linear name -> what its row is to say: ``scaled_into`` and ``alpha``, or ``unscaled``, the reason.
        """
        found, reasons = folds.of(block, names)
        told: dict[str, dict[str, Any]] = {name: {"unscaled": reason} for name, reason in reasons.items()}
        for fold in found:
            read = {name: weights.read(f"{name}.weight").to(block.device, torch.float32) for name in fold.readers}
            keeps = {n: masks[n].to(block.device) if n in masks else torch.ones_like(w).bool() for n, w in read.items()}
            seen, columns = stats[fold.readers[0]], fold.columns.to(block.device)
            with torch.inference_mode():
                scale, alpha = self._search(read, keeps, seen, columns, scheme, order)
            if alpha == 0.0:
                told |= {name: {"scaled_into": fold.into, "alpha": 0.0} for name in fold.readers}
                continue
            made = _fold_(block, fold, scale, read, weights)
            if made is None:
                reason = f"{block.name} computes something else once {fold.into} takes scales"
                told |= {name: {"unscaled": reason} for name in fold.readers}
                continue
            changed = _rescaled(seen, made[columns])
            stats |= dict.fromkeys(fold.readers, changed)
            told |= {name: {"scaled_into": fold.into, "alpha": alpha} for name in fold.readers}
        return told

    def _search(
        self,
        weights: Mapping[str, Tensor],
        keeps: Mapping[str, Tensor],
        stats: InputStats,
        columns: Tensor,
        scheme: Scheme,
        order: Callable[[str], Tensor | None],
    ) -> tuple[Tensor, float]:
        """The best of the scales, one a channel, and its exponent."""
        channels = int(columns.max()) + 1
        squares = torch.zeros(channels, device=columns.device).index_add_(0, columns, stats.need("hessian").diagonal())
        size = (squares / columns.bincount()).sqrt()
        size = size.clamp(min=1e-4 * float(size.max()) or 1.0)
        orders = {name: None if (own := order(name)) is None else own.to(columns.device) for name in weights}
        read = {name: (error_rows(weight), error_rows(keeps[name])) for name, weight in weights.items()}
        best, found = float("inf"), (torch.ones_like(size), 0.0)
        for step in range(self.grid + 1):
            alpha = step / self.grid
            scale = size**alpha
            scale = scale / (scale.max() * scale.min()).sqrt()
            error, wide = 0.0, scale[columns]
            for name, (weight, keep) in read.items():
                made = round_to_nearest(weight * wide, keep, scheme, order=orders[name])
                error += relative_error(weight, made.dequantize(torch.float32) / wide, stats)
            if error < best:
                best, found = error, (scale, alpha)
        return found


def _fold_(block: Block, fold: Fold, scale: Tensor, readers: Mapping[str, Tensor], weights: Weights) -> Tensor | None:
    """Divide what makes the inputs by the scale, and multiply the readers' columns by it.

    Returns: (channels,) what columns were multiplied by, or None if the block then computes something else, in which
        case it is left as it was.
    """
    hidden, before = (each.float() for each in block.sample())
    names = [*fold.rows, *(f"{name}.weight" for name in readers)]
    originals = {name: weights.read(name).clone() for name in names}
    taken = scale
    for name, rows in fold.rows.items():
        old = originals[name].to(scale.device, torch.float32)
        new, at = old.clone(), rows.to(scale.device)
        new[at] /= scale.view(-1, *[1] * (old.dim() - 1))
        weights.replace_(name, new)
        if old.dim() == 1 and name.endswith(".weight"):  # a norm's, rounded; a linear's is yet to be quantised
            held = weights.read(name).to(scale.device, torch.float32)[at]
            taken = torch.where(held != 0, old[at] / held, scale)
    wide = taken[fold.columns.to(scale.device)]
    for name, weight in readers.items():
        weights.replace_(f"{name}.weight", weight * wide)
    after = block.sample()[1].float()
    if float((after - before).norm()) <= _SAME * float((before - hidden).norm()):
        return taken
    for name, original in originals.items():
        weights.replace_(name, original)
    return None


def _rescaled(stats: InputStats, scale: Tensor) -> InputStats:
    """Statistics of the same inputs divided by (in,) ``scale``."""

    def divided(value: Tensor | None, by: Tensor) -> Tensor | None:
        return None if value is None else value / by

    return replace(
        stats,
        mean=divided(stats.mean, scale),
        var=divided(stats.var, scale.square()),
        sqnorm=divided(stats.sqnorm, scale.square()),
        hessian=divided(stats.hessian, scale.outer(scale)),
    )
