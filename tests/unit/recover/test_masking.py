"""Masks and the optimizer together, against updates written out in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.pattern import NM
from compressllm.recover.deferred import Deferred
from compressllm.recover.gradients import clip_
from compressllm.recover.masking import Adaptive, MaskedWeight, Masking
from compressllm.recover.optimizer import Optimizer

BETAS = (0.9, 0.95)


def weight_and_mask(seed: int = 0) -> tuple[Tensor, MaskedWeight]:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    return weight, MaskedWeight(NM(2, 4).keep(weight.abs()), NM(2, 4))


def gradients(steps: int, zero: bool = False) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.zeros(6, 8) if zero else torch.randn(6, 8, generator=random) for _ in range(steps)]


def trained(masking: Masking, weight: Tensor, given: list[Tensor], lr: float = 0.01, decay: float = 0.0) -> Optimizer:
    optimizer = Optimizer({"w": weight}, masking, BETAS, decay)
    for gradient in given:
        mine = {"w": gradient.clone()}
        masking.clean_(mine)
        optimizer.step_(mine, lr)
    return optimizer


def test_fixed_masks_keep_zeros_exact_through_decay_and_clipping() -> None:
    weight, one = weight_and_mask()
    weight.mul_(one.keep)
    keep, expected = one.keep.clone(), weight.double()
    masking = Masking({"w": one})
    optimizer = Optimizer({"w": weight}, masking, BETAS, weight_decay=0.1)
    mu, nu = torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    for t, gradient in enumerate(gradients(20), 1):
        mine = {"w": gradient.clone()}
        masking.clean_(mine)
        norm = clip_(mine, 1.0, lambda x: x)
        g = gradient.double() * keep
        assert norm == pytest.approx(float(g.norm()), rel=1e-5), "a pruned weight's gradient counts in the norm"
        g = g * min(1.0, 1.0 / (float(g.norm()) + 1e-6))
        mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g**2
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (mu / (1 - 0.9**t)) / ((nu / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer.step_(mine, 0.01)
    assert torch.allclose(weight.double(), expected * keep, atol=1e-6)
    assert not weight[~keep].any()
    assert not optimizer.first["w"][~keep].any()
    assert not optimizer.second["w"][~keep].any()


def test_a_step_without_gradient_shrinks_pruned_weights_and_leaves_kept_ones() -> None:
    """The released trainer gets this wrong: a mask of integers reverses the sign."""
    weight, one = weight_and_mask()
    before, keep = weight.clone(), one.keep.clone()
    optimizer = trained(Adaptive({"w": one}, lambda step: 1e-4, 100, 100), weight, gradients(1, zero=True), lr=1e-3)
    after = optimizer.weights["w"]
    assert torch.equal(after[keep], before[keep])
    assert (after[~keep].abs() < before[~keep].abs()).all()


def test_reversed_decay_is_what_the_released_trainer_computes() -> None:
    weight, one = weight_and_mask()
    before, keep = weight.clone(), one.keep.clone()
    complement = ~keep.int()  # -1 where pruned, -2 where kept
    masking = Adaptive({"w": one}, lambda step: 0.5, 100, 100, reversed_sign=True)
    direction = masking.direction("w", torch.zeros(6, 8), weight, 0)
    assert torch.allclose(direction, 0.5 * complement * before)
    after = trained(masking, weight, gradients(1, zero=True), lr=1e-3).weights["w"]
    assert (after.abs() > before.abs()).all(), "it grows them all"


def test_adaptive_update_is_adam_with_decay_outside_the_first_moment() -> None:
    weight, one = weight_and_mask()
    keep, w = one.keep.clone(), weight.double()
    given, strength, lr, wd = gradients(12), 0.05, 0.01, 0.1
    optimizer = trained(Adaptive({"w": one}, lambda step: strength * step, 100, 100), weight, given, lr, wd)
    mu, nu = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(given, 1):
        mu = 0.9 * mu + 0.1 * g.double()
        u = mu / (1 - 0.9**t) + strength * (t - 1) * ~keep * w
        nu = 0.95 * nu + 0.05 * u**2
        w = w - lr * wd * w * keep
        w = w - lr * u / ((nu / (1 - 0.95**t)).sqrt() + 1e-8)
    assert torch.allclose(optimizer.weights["w"].double(), w, atol=1e-5)
    assert torch.allclose(optimizer.first["w"].double(), mu, atol=1e-6), "the first moment holds gradients only"
    assert torch.equal(weight, optimizer.weights["w"] * keep), "the forward uses m * W"


def test_how_fast_pruned_weights_shrink_depends_on_the_learning_rate_not_on_lambda() -> None:
    moved = []
    for strength in (1e-5, 1e-3, 1e-1):  # below that, the update is next to Adam's eps
        weight, one = torch.full((1, 4), 0.02), MaskedWeight(torch.tensor([[True, True, False, False]]), NM(2, 4))
        masking = Adaptive({"w": one}, lambda step, s=strength: s, 10**6, 10**6)
        optimizer = Optimizer({"w": weight}, masking, BETAS, 0.0)
        for _ in range(100):
            optimizer.step_({"w": torch.zeros(1, 4)}, 1e-4)
        moved.append(float(0.02 - optimizer.weights["w"][0, 2]))
    assert max(moved) / min(moved) < 1.1
    assert moved[1] == pytest.approx(100 * 1e-4, rel=0.15)


def test_deferred_update_is_casts() -> None:
    weight, one = weight_and_mask()
    keep, w = one.keep.clone(), weight.double()
    given, strength, lr, steps = gradients(10), 0.3, 0.01, 10
    optimizer = trained(Deferred({"w": one}, strength, steps, 100, 100), weight, given, lr)
    mu, nu = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(given):
        mu = 0.9 * mu + 0.1 * g.double()
        corrected, share = mu / (1 - 0.9 ** (t + 1)), t / steps
        u = torch.where(keep, corrected, (1 - share) * corrected + share * strength * w.sign())
        nu = 0.95 * nu + 0.05 * u**2
        w = w - lr * u / ((nu / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
    assert torch.allclose(optimizer.weights["w"].double(), w, atol=1e-5)
    assert torch.equal(weight, optimizer.weights["w"]), "the forward is dense"
    with optimizer.as_result():
        assert torch.equal(weight, optimizer.weights["w"] * keep)
    assert torch.equal(weight, optimizer.weights["w"]), "and dense again"


@pytest.mark.parametrize("transposed", [False, True])
def test_scales_are_trained_with_the_weight_as_autograd_would(transposed: bool) -> None:
    """W and A are trained by what a product W A gives each of them; the parameter holds the product."""

    def turned(x: Tensor) -> Tensor:
        return x.T.contiguous() if transposed else x

    weight, one = weight_and_mask()
    keep, strength, lr, steps = one.keep.clone(), 0.3, 0.01, 10
    w, a = weight.double(), torch.ones(6, 2, dtype=torch.float64)
    parameter = turned(weight.clone())
    masking = Deferred({"w": MaskedWeight(turned(keep), NM(2, 4), transposed)}, strength, steps, 100, 100, scales=2)
    optimizer = Optimizer({"w": parameter}, masking, BETAS, weight_decay=0.0)
    moments = [torch.zeros_like(x) for x in (w, w, a, a)]
    for t, g in enumerate(gradients(steps)):
        optimizer.step_({"w": turned(g)}, lr)
        wide, corrections = a.repeat_interleave(4, dim=1), (1 - 0.9 ** (t + 1), 1 - 0.95 ** (t + 1))
        by_w, by_a = g.double() * wide, (g.double() * w).view(6, 2, 4).sum(2)
        moments[0] = 0.9 * moments[0] + 0.1 * by_w
        moments[2] = 0.9 * moments[2] + 0.1 * by_a
        moments[3] = 0.95 * moments[3] + 0.05 * by_a**2
        mu, share = moments[0] / corrections[0], t / steps
        u = torch.where(keep, mu, (1 - share) * mu + share * strength * w.sign())
        moments[1] = 0.95 * moments[1] + 0.05 * u**2
        w = w - lr * u / ((moments[1] / corrections[1]).sqrt() + 1e-8)
        a = a - lr * moments[2] / corrections[0] / ((moments[3] / corrections[1]).sqrt() + 1e-8)
    product = w * a.repeat_interleave(4, dim=1)
    assert (a - 1).abs().max() > 0.01
    assert torch.allclose(turned(parameter).double(), product, atol=1e-5)
    assert torch.allclose(turned(optimizer.result("w")).double(), product * keep, atol=1e-5)


def test_scales_need_parts_of_equal_width() -> None:
    weight, one = weight_and_mask()
    with pytest.raises(RecipeError, match="w: 8 inputs cannot be divided into 3 scaled parts"):
        Optimizer({"w": weight}, Deferred({"w": one}, 0.1, 10, 5, 9, scales=3), BETAS, 0.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_refresh_keeps_the_largest_and_counts_flips(transposed: bool) -> None:
    _, one = weight_and_mask()
    first = one.keep.clone()
    moved = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    held = MaskedWeight(first.T.contiguous() if transposed else first, NM(2, 4), transposed)
    masking = Adaptive({"w": held}, lambda step: 1e-4, 2, 7)
    assert [step for step in range(1, 11) if masking.refreshes(step)] == [2, 4, 6]
    counts = masking.refresh_({"w": moved.T.contiguous() if transposed else moved}.__getitem__, 2).metrics()
    expected = NM(2, 4).keep(moved.abs())
    now = masking.weights["w"].keep
    assert torch.equal(now.T if transposed else now, expected)
    flipped = int((expected != first).sum())
    assert counts["flip_rate"] == counts["flip_rate_from_first"] == flipped / 48
    assert counts["kept_mean"] == pytest.approx(float(moved[expected].abs().mean()), rel=1e-5)
    assert counts["masked_mean"] == pytest.approx(float(moved[~expected].abs().mean()), rel=1e-5)
    assert counts["masked_max"] == pytest.approx(float(moved[~expected].abs().max()))


def test_master_weights_take_steps_that_bfloat16_cannot() -> None:
    parameter = torch.ones(4, 4, dtype=torch.bfloat16)
    optimizer = Optimizer({"w": parameter}, Masking({}), BETAS, 0.0)
    for _ in range(100):
        optimizer.step_({"w": torch.ones(4, 4)}, 1e-5)
    assert optimizer.weights["w"].dtype == torch.float32
    assert float(optimizer.weights["w"][0, 0]) == pytest.approx(1 - 100 * 1e-5, abs=5e-6)
    assert torch.equal(parameter, optimizer.weights["w"].to(torch.bfloat16))


def test_vectors_are_not_decayed() -> None:
    parameters = {"matrix": torch.ones(2, 2), "vector": torch.ones(2)}
    optimizer = Optimizer(copy.deepcopy(parameters), Masking({}), BETAS, weight_decay=0.5)
    optimizer.step_({name: torch.zeros_like(value) for name, value in parameters.items()}, 0.1)
    assert torch.allclose(optimizer.weights["matrix"], torch.full((2, 2), 0.95))
    assert torch.equal(optimizer.weights["vector"], parameters["vector"])
    assert math.isfinite(float(optimizer.first["vector"].sum()))
