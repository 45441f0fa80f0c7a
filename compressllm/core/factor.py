"""The triangular factor of an inverse Hessian, which second-order methods walk along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError
from compressllm.core.parallel import for_chunks
from compressllm.core.stats import InputStats

_TILE = 512  # rows and columns done at once: large enough for the matrix products to run at full speed


@dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor of an inverse Hessian.

    Args:
        upper: (in, in) float32 U with a positive diagonal, ``U^T U = (H + damping * mean(diag H) * I)^-1``. Row c
            divided by ``U_cc`` is the optimal change of the columns from c on when column c is removed and the
            columns before it are fixed; ``U_cc ** 2`` is the first diagonal element of the inverse of ``H[c:, c:]``.
        damping: What was added to the diagonal, as a share of its mean.
        dead: Number of inputs that were always zero.
        fallback: How it was made if not in float32 with the damping asked for, in one line; None if it was.
    """

    upper: Tensor
    damping: float
    dead: int
    fallback: str | None = None


def inverse_factor(stats: InputStats, damping: float = 0.01) -> InverseFactor:
    """The factor of the inverse of ``stats.hessian``, made once for all linears that share these statistics.

    If float32 does not do with this damping, more is tried, then float64, and last the eigenvalues, the small ones
    raised. Inputs that were always zero get the damping alone. Beside the Hessian the first attempt holds nothing but
    the result and a few tiles; float64 takes five times as much. The result is the same for any number of threads.

    Raises: CalibrationError if the Hessian has no usable factor at all, or was not collected.
    """
    return stats.derive(("inverse factor", damping), lambda: factorize(stats.need("hessian"), damping))


def factorize(hessian: Tensor, damping: float = 0.01) -> InverseFactor:
    """The factor of the inverse of an (in, in) float32 ``hessian``, of which the upper triangle is read.

    Raises: CalibrationError if it has none.
    """
    dead = int((hessian.diagonal() == 0).count_nonzero())
    mean = float(hessian.diagonal().double().mean()) or 1.0  # with all inputs dead any multiple of I will do
    for attempt, (how, used, factor) in enumerate(_attempts(hessian, mean, damping)):
        # One pass; NaN and infinity never leave a sum.
        if factor is not None and factor.sum().isfinite():
            fallback = f"the Hessian has no Cholesky factor in float32 with damping {damping:g}; factored it {how}"
            return InverseFactor(factor, used, dead, fallback if attempt else None)
        del factor  # before the next attempt makes its own
    raise CalibrationError(
        "the second moments of the inputs have no factor even by eigenvalues: they are not finite or not those of "
        "any inputs; check the checkpoint, or calibrate with --dtype float32"
    )


def _attempts(hessian: Tensor, mean: float, damping: float) -> Iterator[tuple[str, float, Tensor | None]]:
    """How, the damping used, and the factor or None: from the cheapest to the one that does not fail."""
    for times in (1, 3, 10):
        used = damping * times
        yield f"in float32 with damping {used:g}", used, _by_cholesky(hessian, used * mean)
    for times in (1, 10):
        used = damping * times
        factor = _by_cholesky(hessian.double(), used * mean)
        yield f"in float64 with damping {used:g}", used, None if factor is None else factor.float()
        del factor
    used = damping * 10
    how = f"by eigenvalues, those below {used:g} of the mean diagonal raised to it"
    yield how, used, _by_eigenvalues(hessian, used * mean)


def _by_cholesky(hessian: Tensor, added: float) -> Tensor | None:
    """U for ``hessian + added * I`` in the dtype of ``hessian``, or None if that is not positive definite.

    Read from the last row and column to the first, a lower Cholesky factor is an upper one, ``H = R R^T``. Since
    ``H^-1 = R^-T R^-1``, the factor wanted is R^-1: half the work of inverting first and factoring the inverse.
    """
    matrix = hessian.flip((0, 1)).contiguous()
    matrix.diagonal().add_(added)
    if not _cholesky_(matrix):
        return None
    _invert_lower_(matrix)
    _reverse_(matrix)
    return matrix


def _cholesky_(matrix: Tensor) -> bool:
    """Replace a symmetric matrix, its lower triangle read, by its lower Cholesky factor; False if it has none.

    Left-looking by tiles: what lies above the diagonal tiles is not touched.
    """
    size, good = matrix.shape[0], True
    for at in range(0, size, _TILE):
        panel = slice(at, min(at + _TILE, size))
        corner = matrix[panel, panel]

        def work(rows: slice, at: int = at, panel: slice = panel, corner: Tensor = corner) -> None:
            nonlocal good
            tile = matrix[rows, panel].addmm_(matrix[rows, :at], matrix[panel, :at].mT, alpha=-1)
            if rows.start == at:  # the first, and the others wait for it
                factor, info = torch.linalg.cholesky_ex(tile)
                good = not int(info)
                corner.copy_(factor)
            elif good:
                tile.copy_(torch.linalg.solve_triangular(corner.mT, tile, upper=True, left=False))

        for_chunks(work, at, size, _TILE, matrix.device, first_alone=True)
        if not good:
            return False
    return True


def _invert_lower_(matrix: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse, and what lies above the diagonal by zeros.

    From the last tile to the first: with the columns behind a tile inverted to X, what stands below the tile D
    becomes ``-X P D^-1``, where P is what stood there.
    """
    size = matrix.shape[0]
    eye = torch.eye(min(_TILE, size), dtype=matrix.dtype, device=matrix.device)
    for at in reversed(range(0, size, _TILE)):
        end = min(at + _TILE, size)
        corner = matrix[at:end, at:end]
        below = matrix[end:, at:end].clone()

        def work(rows: slice, at: int = at, end: int = end, corner: Tensor = corner, below: Tensor = below) -> None:
            if rows.start == at:
                inverse = torch.linalg.solve_triangular(corner, eye[: end - at, : end - at], upper=False)
                corner.copy_(inverse)
                matrix[at:end, end:] = 0.0
                return
            product = matrix[rows, end : rows.stop] @ below[: rows.stop - end]
            torch.mm(product.neg_(), corner, out=matrix[rows, at:end])

        for_chunks(work, at, size, _TILE, matrix.device, first_alone=True)


def _reverse_(matrix: Tensor) -> None:
    """Put the rows and the columns of a square matrix in reverse order, without a second matrix."""
    size = matrix.shape[0]
    half = size // 2

    def swap(rows: slice) -> None:
        upper, lower = matrix[rows], matrix[size - rows.stop : size - rows.start]
        kept = upper.clone()
        upper.copy_(lower.flip((0, 1)))
        lower.copy_(kept.flip((0, 1)))

    # Few rows at a time: a tile of whole rows is large, and not all memory that is freed goes back at once.
    for_chunks(swap, 0, half, max(1, _TILE // 8), matrix.device)
    if size % 2:
        matrix[half] = matrix[half].flip(0)


def _by_eigenvalues(hessian: Tensor, floor: float) -> Tensor | None:
    """U for ``hessian`` with its eigenvalues raised to at least ``floor``."""
    try:
        values, vectors = torch.linalg.eigh(hessian.double(), UPLO="U")
        # H^-1 = B^T B with the rows of B the eigenvectors over the roots of their values, so that U is the R of B = QR.
        root = vectors.mT / values.clamp_(min=floor).sqrt()[:, None]
        upper = torch.linalg.qr(root, mode="r").R
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # does not converge, or is not finite
        return None
    signed: Tensor = upper * upper.diagonal().sign()[:, None]
    return signed.float()
