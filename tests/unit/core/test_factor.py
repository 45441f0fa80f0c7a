from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressllm.core import factor as home
from compressllm.core.errors import CalibrationError
from compressllm.core.factor import factorize, inverse_factor
from compressllm.core.stats import InputStats


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles far smaller than the Hessians, so that there are several, the last of them ragged."""
    monkeypatch.setattr(home, "_TILE", 5)


def random_hessian(size: int = 17, tokens: int = 60, seed: int = 0) -> Tensor:
    """Of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return x.T @ x / tokens


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """In float64."""
    return hessian.double() + damping * float(hessian.diagonal().mean()) * torch.eye(len(hessian))


def indefinite(below: float, size: int = 12) -> Tensor:
    """Mean diagonal 1 and a smallest eigenvalue of ``-below``."""
    vectors = torch.linalg.qr(random_hessian(size).double()).Q
    rest = (size + below) / (size - 1)
    values = torch.full((size,), rest, dtype=torch.float64)
    values[3] = -below
    return ((vectors * values) @ vectors.T).float()


@pytest.mark.parametrize("size", [1, 4, 5, 6, 10, 17])
def test_factor_is_the_upper_one_of_the_inverse_of_the_damped_hessian(size: int) -> None:
    hessian = random_hessian(size)
    found = factorize(hessian, 0.02)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, 0.02)), upper=True)
    torch.testing.assert_close(found.upper.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert found.upper.dtype == torch.float32
    assert torch.equal(found.upper, found.upper.triu())
    assert found.upper.is_contiguous()
    assert (found.damping, found.dead, found.fallback) == (0.02, 0, None)


def test_a_tile_larger_than_the_hessian_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = random_hessian()
    tiled = factorize(hessian).upper
    monkeypatch.setattr(home, "_TILE", 512)
    torch.testing.assert_close(factorize(hessian).upper, tiled, rtol=1e-4, atol=1e-5)


def test_the_hessian_is_left_as_it_was_and_its_layout_does_not_matter() -> None:
    hessian = random_hessian()
    hessian = (hessian + hessian.T) / 2
    before = hessian.clone()
    upper = factorize(hessian).upper
    assert torch.equal(hessian, before)
    assert torch.equal(factorize(hessian.T.contiguous().T).upper, upper)


def test_threads_and_inference_mode_do_not_change_a_bit() -> None:
    hessian = random_hessian(40, 90)
    expected = factorize(hessian).upper
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            assert torch.equal(factorize(hessian.clone()).upper, expected)
    finally:
        torch.set_num_threads(1)


def test_more_inputs_than_tokens() -> None:
    hessian = random_hessian(24, 6)
    found = factorize(hessian)
    assert found.fallback is None
    identity = found.upper.double() @ damped(hessian) @ found.upper.double().T
    torch.testing.assert_close(identity, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-3)


def test_dead_inputs_get_the_damping_alone_and_are_counted() -> None:
    hessian = random_hessian()
    hessian[4:7], hessian[:, 4:7] = 0.0, 0.0
    found = factorize(hessian)
    assert found.dead == 3
    alone = (0.01 * float(hessian.diagonal().mean())) ** -0.5
    torch.testing.assert_close(found.upper[4:7, 4:7], torch.eye(3) * alone)
    assert not found.upper[:4, 4:7].any()
    assert not found.upper[4:7, 7:].any()


def test_with_all_inputs_dead_all_columns_are_alike() -> None:
    found = factorize(torch.zeros(7, 7))
    assert found.dead == 7
    torch.testing.assert_close(found.upper, torch.eye(7) * 10)
    assert found.fallback is None


@pytest.mark.parametrize(
    ("below", "used", "how"),
    [
        (0.02, 0.03, "in float32 with damping 0.03"),
        (0.05, 0.1, "in float32 with damping 0.1"),
        (0.5, 0.1, "by eigenvalues, those below 0.1 of the mean diagonal raised to it"),
    ],
)
def test_what_is_not_positive_definite_is_damped_more(below: float, used: float, how: str) -> None:
    hessian = indefinite(below)
    found = factorize(hessian)
    assert found.damping == pytest.approx(used)
    assert found.fallback == f"the Hessian has no Cholesky factor in float32 with damping 0.01; factored it {how}"
    if "eigenvalues" in how:
        values, vectors = torch.linalg.eigh(hessian.double())
        whole = (vectors * values.clamp(min=0.1)) @ vectors.T
    else:
        whole = damped(hessian, used)
    assert torch.equal(found.upper, found.upper.triu())
    assert (found.upper.diagonal() > 0).all()
    identity = found.upper.double() @ whole @ found.upper.double().T
    torch.testing.assert_close(identity, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)


def failing(*fails: tuple[torch.dtype, int], spoil: bool = False) -> Callable[..., Any]:
    """A stand-in for `_by_cholesky` that fails, or spoils its result, the first times it is called with a dtype."""
    left, real = dict(fails), home._by_cholesky

    def stand_in(hessian: Tensor, added: float) -> Tensor | None:
        if left.get(hessian.dtype, 0):
            left[hessian.dtype] -= 1
            return torch.full_like(hessian, torch.nan) if spoil else None
        return real(hessian, added)

    return stand_in


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize(
    ("single", "double", "used", "how"),
    [
        (1, 0, 0.03, "in float32 with damping 0.03"),
        (2, 0, 0.1, "in float32 with damping 0.1"),
        (3, 0, 0.01, "in float64 with damping 0.01"),
        (3, 1, 0.1, "in float64 with damping 0.1"),
        (3, 2, 0.1, "by eigenvalues, those below 0.1"),
    ],
)
def test_every_rung_of_the_ladder(
    monkeypatch: pytest.MonkeyPatch, spoil: bool, single: int, double: int, used: float, how: str
) -> None:
    monkeypatch.setattr(home, "_by_cholesky", failing((torch.float32, single), (torch.float64, double), spoil=spoil))
    hessian = random_hessian() + 20 * torch.eye(17)  # no eigenvalue is below the floor
    found = factorize(hessian)
    assert found.fallback is not None
    assert how in found.fallback
    assert found.damping == pytest.approx(used)
    assert found.upper.dtype == torch.float32
    added = 0.0 if "eigenvalues" in how else used
    identity = found.upper.double() @ damped(hessian, added) @ found.upper.double().T
    torch.testing.assert_close(identity, torch.eye(17, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    hessian = random_hessian()
    hessian[3, 2] = hessian[2, 3] = bad
    with pytest.raises(CalibrationError, match="have no factor even by eigenvalues"):
        factorize(hessian)


def test_statistics_share_one_factor_for_each_damping() -> None:
    stats = InputStats(60, hessian=random_hessian())
    once = inverse_factor(stats, 0.01)
    assert inverse_factor(stats, 0.01) is once
    assert inverse_factor(stats, 0.1).damping == 0.1
    assert torch.equal(once.upper, factorize(stats.need("hessian")).upper)


def test_statistics_without_a_hessian_say_so() -> None:
    with pytest.raises(CalibrationError, match="'hessian' was not collected"):
        inverse_factor(InputStats(60))
