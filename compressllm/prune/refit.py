"""Refit: the best values for the weights that a mask keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import PRUNERS, Pruned, Pruner
from compressllm.core.stats import InputStats, Need
from compressllm.prune.refiner import Refiner
from compressllm.prune.rows import each_rows
from compressllm.prune.wanda import Wanda


class ScaledHessian(NamedTuple):
    """A damped Hessian in units of its own diagonal.

    Args:
        matrix: (in, in) float32 ``(G + λI)_jk / (scale_j scale_k)``, its diagonal 1.
        scale: (in,) float32 square roots of the diagonal of ``G + λI``.
    """

    matrix: Tensor
    scale: Tensor


class Fit(NamedTuple):
    """Weights on a mask, and how far they are from the dense ones.

    Args:
        weight: (out, in) float32, +0.0 off the mask.
        loss: (out,) float32 damped loss of each row, ``(w-v)(G+λI)(w-v)^T``.
        steps: Steps that the slowest row took.
    """

    weight: Tensor
    loss: Tensor
    steps: int


def scale_hessian(hessian: Tensor, damping: float) -> ScaledHessian:
    """Damp an (in, in) Hessian by ``damping`` times its mean diagonal, and scale it to a diagonal of 1.

    An input that was always 0 keeps the damping alone, or gets the scale 1 where there is none.
    """
    diagonal = hessian.diagonal()
    scale = (diagonal + damping * diagonal.mean()).clamp_min(0.0).sqrt()
    scale = torch.where(scale > 0.0, scale, 1.0)
    matrix = hessian / scale
    matrix /= scale[:, None]
    matrix.diagonal().fill_(1.0)  # the damping is on the diagonal alone
    return ScaledHessian(matrix, scale)


def refit_weights(
    weight: Tensor,
    keep: Tensor,
    hessian: Tensor,
    damping: float = 0.01,
    start: Tensor | None = None,
    iterations: int = 30,
    tolerance: float = 1e-4,
) -> Tensor:
    """Weights V on a mask that come nearest to the dense W: they minimise ``tr((W-V)(G+λI)(W-V)^T)``.

    No row is further from W than that of ``start``. Does not change its arguments.

    Args:
        weight: Dense (out, in) float32 W.
        keep: (out, in) bool, of any pattern.
        hessian: (in, in) float32 G, ``X^T X / tokens``.
        damping: λ as a fraction of the mean of G's diagonal.
        start: (out, in) float32 weights to begin from, taken as 0 off the mask; W if None.
        iterations: At most so many steps, each one (out, in) x (in, in) product.
        tolerance: Where to stop, see `refit_scaled`.

    Returns: (out, in) float32, +0.0 off the mask.
    """
    return refit_scaled(weight, keep, scale_hessian(hessian, damping), start, iterations, tolerance).weight


@torch.no_grad()
def refit_scaled(
    weight: Tensor,
    keep: Tensor,
    hessian: ScaledHessian,
    start: Tensor | None = None,
    iterations: int = 30,
    tolerance: float = 1e-4,
) -> Fit:
    """`refit_weights` with a Hessian that is damped and scaled already.

    Each row is solved by conjugate gradients over its kept weights, with a step length of its own. Dividing by the
    diagonal of the Hessian is the preconditioner: outlier inputs would spoil the condition otherwise.

    Args:
        tolerance: A row stops when the norm of its gradient on the mask is this fraction of the norm of its dense
            weights, both in units of the inputs' size.

    Source: Meng et al., ALPS, arXiv 2406.07831, algorithm 2, with one step length a row.
    """
    matrix, scale = hessian
    weight = weight.contiguous()  # another layout is summed in another order
    start = weight if start is None else start.contiguous()
    result = torch.empty(weight.shape, device=weight.device)
    losses = torch.empty(weight.shape[0], device=weight.device)
    steps = [0]

    def solve(rows: slice) -> None:
        dense, kept = weight[rows] * scale, keep[rows]
        fit = _conjugate_gradients(dense, kept, matrix, start[rows] * scale, iterations, tolerance)
        result[rows] = torch.where(kept, fit.weight / scale, 0.0)
        losses[rows] = fit.loss
        steps.append(fit.steps)

    each_rows(solve, weight)
    return Fit(result, losses, max(steps))


def damped_energy(weight: Tensor, hessian: ScaledHessian) -> float:
    """``tr(W(G+λI)W^T)`` of an (out, in) weight: the damped loss of removing all of it."""
    weight = weight.contiguous()
    energy = torch.empty(weight.shape[0], device=weight.device)

    def measure(rows: slice) -> None:
        scaled = weight[rows] * hessian.scale
        energy[rows] = ((scaled @ hessian.matrix) * scaled).sum(1)

    each_rows(measure, weight)
    return float(energy.double().sum())


def _conjugate_gradients(
    dense: Tensor, keep: Tensor, matrix: Tensor, start: Tensor, iterations: int, tolerance: float
) -> Fit:
    """Minimise ``(dense-v) matrix (dense-v)^T`` of each row over v on the mask; all in scaled units."""
    value = begun = torch.where(keep, start, 0.0)
    pull = (dense - value) @ matrix
    before = ((dense - value) * pull).sum(1)
    residual = torch.where(keep, pull, 0.0)  # minus half the gradient
    square = residual.square().sum(1)
    enough = dense.square().sum(1) * tolerance**2
    direction, steps = residual, 0
    for _ in range(iterations):
        going = square > enough
        if not going.any():
            break
        ahead = direction @ matrix
        curvature = (direction * ahead).sum(1)
        length = torch.where(going & (curvature > 0.0), square / curvature, 0.0)[:, None]
        value = value + length * direction
        residual = residual - length * torch.where(keep, ahead, 0.0)
        last, square = square, residual.square().sum(1)
        turn = torch.where(going, square / last, 0.0)[:, None]
        direction = residual + turn * direction
        steps += 1
    if not steps:
        return Fit(begun, before, steps)
    after = ((dense - value) * ((dense - value) @ matrix)).sum(1)
    better = after < before  # false for NaN; rounding can undo a step of a row that was at its optimum
    return Fit(torch.where(better[:, None], value, begun), torch.where(better, after, before), steps)


@PRUNERS.register("refit")
@dataclass(frozen=True)
class Refit(Refiner):
    """Keep another pruner's mask, and give what stays the values that come nearest to the dense output.

    Minimises ``||(W - V) X||^2 + λ||W - V||^2`` over V on the mask.

    Args:
        init: Chooses the mask.
        damping: λ as a fraction of the Hessian's mean diagonal.
        iterations: At most so many steps of conjugate gradients.
        tolerance: Stop a row when its gradient is this small beside its weights, in units of the inputs' size.

    Source: the post-processing of Meng et al., ALPS, arXiv 2406.07831, sec. 3.3.
    """

    init: Pruner = field(default_factory=Wanda)
    damping: float = 0.01
    iterations: int = 30
    tolerance: float = 1e-4
    reads: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 0.0)
        check_range("iterations", self.iterations, 0)
        check_range("tolerance", self.tolerance, 0.0)

    @torch.no_grad()
    def refine(self, weight: Tensor, keep: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """The best weights on ``keep``, which stays as it is."""
        hessian = shared_hessian(stats, self.damping)
        fit = refit_scaled(weight, keep, hessian, None, self.iterations, self.tolerance)
        whole = damped_energy(weight, hessian)
        loss = float(fit.loss.double().sum())
        return Pruned(keep.clone(), fit.weight, {"damped_loss": loss / whole if whole else 0.0, "steps": fit.steps})


def shared_hessian(stats: InputStats, damping: float) -> ScaledHessian:
    """`scale_hessian` of what a linear saw, made once for all linears of the same input."""
    return stats.derive(("scaled hessian", damping), lambda: scale_hessian(stats.need("hessian"), damping))


def check_range(option: str, value: float, least: float) -> None:
    """Raises: ValueError, which `build` turns into a RecipeError, if ``value`` is below ``least`` or not finite."""
    if not least <= value < float("inf"):
        raise ValueError(f"{option}={value}: needs to be at least {least}")
