"""Losses at the output head, against plain autograd on full logits."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compressllm.core.errors import RecipeError
from compressllm.recover import head as headmodule
from compressllm.recover import topk
from compressllm.recover.head import Head
from compressllm.recover.headchunks import TeacherHidden, TeacherTopK
from compressllm.recover.headloss import head_loss
from compressllm.recover.losses import LossWeights

T, V, D = 11, 37, 6
ALL = LossWeights(ce=0.3, kl=0.7, reverse_kl=0.2)


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Head, Tensor, TeacherHidden]:
    """Hidden states, head and labels (some ignored) of a student, and a teacher of another width."""
    random = torch.Generator().manual_seed(seed)
    draw: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    head = Head(draw(V, D).requires_grad_(), draw(V).requires_grad_())
    labels = torch.randint(0, V, (T,), generator=random)
    labels[[2, 3, 10]] = -100
    return draw(T, D).requires_grad_(), head, labels, TeacherHidden(draw(T, D + 2), Head(draw(V, D + 2)))


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    logits = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def slow(student: Tensor, labels: Tensor, teacher: Tensor, weights: LossWeights, t: float) -> dict[str, Tensor]:
    """Means over labelled positions, from full logits."""
    valid = labels != -100
    q, p = (student[valid] / t).log_softmax(-1), (teacher[valid] / t).log_softmax(-1)
    return {
        "ce": F.cross_entropy(student[valid], labels[valid]),
        "kl": t * t * F.kl_div(q, p, log_target=True, reduction="sum") / valid.sum(),
        "reverse_kl": t * t * F.kl_div(p, q, log_target=True, reduction="sum") / valid.sum(),
    }


def total(parts: dict[str, Tensor], weights: LossWeights) -> Tensor:
    return weights.ce * parts["ce"] + weights.kl * parts["kl"] + weights.reverse_kl * parts["reverse_kl"]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize(
    "weights",
    [ALL, LossWeights(kl=1.0), LossWeights(ce=2.0), LossWeights(reverse_kl=0.5), LossWeights(ce=1, kl=2)],
    ids=str,
)
@pytest.mark.parametrize("shaped", [{}, {"scale": 0.4}, {"softcap": 2.0, "scale": 1.5}], ids=str)
def test_values_and_gradients_are_those_of_full_logits(
    weights: LossWeights, chunk: int | None, temperature: float, shaped: dict[str, float]
) -> None:
    hidden, head, labels, teacher = tensors()
    head = Head(head.weight, head.bias, **shaped)
    known = [hidden, head.weight, head.bias]
    expected = slow(logits_of(hidden, head), labels, logits_of(teacher.hidden, teacher.head), weights, temperature)
    wanted = torch.autograd.grad(total(expected, weights), known)

    loss, parts = head_loss(hidden, head, labels, teacher, weights, temperature, chunk)

    torch.testing.assert_close(loss, total(expected, weights))
    assert {name for name in ("ce", "kl", "reverse_kl") if getattr(weights, name)} <= parts.keys()
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name].detach())
    for got, want in zip(torch.autograd.grad(3.0 * loss, known), wanted, strict=True):
        torch.testing.assert_close(got, 3.0 * want)


def test_a_position_predicts_the_token_after_it() -> None:
    # Three tokens 5, 1, 4. The head reads the hidden state as the logits; 1 follows 5, 4 follows 1.
    hidden = torch.full((3, 6), -4.0)
    hidden[0, 1] = hidden[1, 4] = hidden[2, 2] = 4.0
    labels = torch.tensor([1, 4, -100])
    loss, parts = head_loss(hidden, Head(torch.eye(6)), labels, None, LossWeights(ce=1.0))
    assert float(loss) == pytest.approx(math.log(1 + 5 * math.exp(-8)), abs=1e-5)
    assert float(parts["ce"]) == float(loss)


def test_equal_logits_have_no_divergence_and_no_gradient() -> None:
    hidden, head, labels, _ = tensors(dtype=torch.float32)
    head = Head(head.weight)
    loss, parts = head_loss(
        hidden, head, labels, TeacherHidden(hidden, head), LossWeights(kl=1.0, reverse_kl=1.0), temperature=2.0
    )
    loss.backward()
    assert float(parts["kl"]) == 0.0
    assert abs(float(parts["reverse_kl"])) < 1e-6
    assert float(hidden.grad.abs().max()) < 1e-6


def test_what_stands_at_ignored_positions_does_not_matter() -> None:
    hidden, head, labels, teacher = tensors()
    before, _ = head_loss(hidden, head, labels, teacher, ALL, 2.0)
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
        teacher.hidden[labels == -100] = torch.inf
    after, _ = head_loss(hidden, head, labels, teacher, ALL, 2.0)
    assert torch.equal(before, after)
    after.backward()
    assert not hidden.grad[labels == -100].any()
    assert hidden.grad.isfinite().all()


def test_micro_batches_add_up_to_the_batch() -> None:
    hidden, head, labels, teacher = tensors()
    whole, parts = head_loss(hidden, head, labels, teacher, ALL, 2.0)
    halves = [slice(0, 4), slice(4, T)]
    pieces = [
        head_loss(
            hidden[at], head, labels[at], TeacherHidden(teacher.hidden[at], teacher.head), ALL, 2.0, denominator=8
        )
        for at in halves
    ]
    torch.testing.assert_close(pieces[0][0] + pieces[1][0], whole)
    torch.testing.assert_close(pieces[0][1]["kl"] + pieces[1][1]["kl"], parts["kl"])


def test_nothing_to_predict_is_a_loss_of_zero_with_a_graph() -> None:
    hidden, head, labels, teacher = tensors()
    loss, _ = head_loss(hidden, head, torch.full_like(labels, -100), teacher, ALL)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden.grad.any()


def test_the_gradient_hardly_depends_on_the_temperature() -> None:
    hidden, head, labels, _ = tensors()
    small = Head(0.05 * head.weight.detach())  # where softmax is nearly linear, T^2 makes it not depend at all
    teacher = TeacherHidden(hidden.detach() + 0.1, small)
    norms = []
    for temperature in (1.0, 4.0):
        loss, _ = head_loss(hidden, small, labels, teacher, LossWeights(kl=1.0), temperature)
        norms.append(float(torch.autograd.grad(loss, hidden)[0].norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels, teacher = tensors()
    frozen = Head(head.weight.detach(), head.bias.detach())
    expected, _ = head_loss(hidden, head, labels, teacher, ALL)
    loss, _ = head_loss(hidden, frozen, labels, teacher, ALL)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))
    assert not head_loss(hidden.detach(), frozen, labels, teacher, ALL)[0].requires_grad
    with torch.no_grad():
        assert not head_loss(hidden, head, labels, teacher, ALL)[0].requires_grad


def test_half_precision_is_summed_in_float32() -> None:
    hidden, head, labels, teacher = tensors(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    wide = TeacherHidden(teacher.hidden.double(), Head(teacher.head.weight.double()))
    expected, _ = head_loss(exact[0], Head(exact[1], exact[2]), labels, wide, ALL, 2.0)
    loss, _ = head_loss(hidden, head, labels, teacher, ALL, 2.0)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    for got, want in zip((hidden, head.weight, head.bias), torch.autograd.grad(expected, exact), strict=True):
        assert got.grad.dtype == torch.bfloat16
        torch.testing.assert_close(got.grad.double(), want, rtol=0.01, atol=1e-3)


def top_k(teacher: Tensor, k: int) -> TeacherTopK:
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return TeacherTopK(ids, logprobs, (1 - logprobs.exp().sum(-1)).log())


def slow_top_k(student: Tensor, teacher: TeacherTopK, labels: Tensor, t: float) -> dict[str, Tensor]:
    valid = labels != -100
    q = student.softmax(-1).gather(1, teacher.ids)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).log()
    p = torch.cat([teacher.logprobs, teacher.tail.unsqueeze(1)], -1)
    q, p = ((x[valid] / t).log_softmax(-1) for x in (q, p))
    return {
        "ce": F.cross_entropy(student, labels),
        "kl": t * t * F.kl_div(q, p, log_target=True, reduction="sum") / valid.sum(),
        "reverse_kl": t * t * F.kl_div(p, q, log_target=True, reduction="sum") / valid.sum(),
    }


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shaped", [{}, {"softcap": 2.0, "scale": 1.5}], ids=str)
def test_top_k_values_and_gradients(temperature: float, shaped: dict[str, float]) -> None:
    hidden, head, labels, teacher = tensors()
    head = Head(head.weight, head.bias, **shaped)
    cached = top_k(logits_of(teacher.hidden, teacher.head), 5)
    known = [hidden, head.weight, head.bias]
    expected = slow_top_k(logits_of(hidden, head), cached, labels, temperature)
    wanted = torch.autograd.grad(total(expected, ALL), known)
    loss, parts = head_loss(hidden, head, labels, cached, ALL, temperature, chunk=3)
    torch.testing.assert_close(loss, total(expected, ALL))
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name].detach())
    for got, want in zip(torch.autograd.grad(loss, known), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("seed", range(4))
def test_top_k_never_exceeds_the_whole_divergence(seed: int) -> None:
    hidden, head, labels, teacher = tensors(seed)
    whole = head_loss(hidden, head, labels, teacher, LossWeights(kl=1.0))[1]["kl"]
    logits = logits_of(teacher.hidden, teacher.head)
    values = [
        float(head_loss(hidden, head, labels, top_k(logits, k), LossWeights(kl=1.0))[1]["kl"])
        for k in (1, 4, 16, V - 1)
    ]
    assert values == sorted(values)
    assert 0 < values[0] < values[2] <= float(whole) + 1e-9
    assert values[-1] == pytest.approx(float(whole))  # the bucket holds a single token


class Largest(TorchDispatchMode):
    """The most elements any tensor had that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("weights", [ALL, LossWeights(kl=1.0), LossWeights(ce=1.0)], ids=str)
def test_no_more_than_a_chunk_of_logits_is_alive(weights: LossWeights) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 4, generator=random).requires_grad_()
    head = Head(torch.randn(100, 4, generator=random).requires_grad_())
    labels = torch.randint(0, 100, (64,), generator=random)
    with Largest() as largest:
        loss, _ = head_loss(hidden, head, labels, TeacherHidden(hidden.detach(), head), weights, 2.0, chunk=8)
        loss.backward()
    assert largest.elements == 8 * 100  # of 64 x 100; the weight's own 400 are fewer


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, labels, teacher = tensors()
    loss, _ = head_loss(hidden, head, labels, teacher, ALL)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_distilling_needs_a_teacher_of_the_same_vocabulary() -> None:
    hidden, head, labels, teacher = tensors()
    with pytest.raises(RecipeError, match="needs a teacher"):
        head_loss(hidden, head, labels, None, ALL)
    other = TeacherHidden(teacher.hidden, Head(teacher.head.weight[:-1]))
    with pytest.raises(RecipeError, match="has 36 tokens, the student's 37"):
        head_loss(hidden, head, labels, other, ALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bfloat16_head_is_multiplied_as_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if setting is None:
        pytest.skip("this torch cannot be told how to round the inputs of products")
    monkeypatch.setattr("compressllm.recover.head.multiplies_bf16_faster", lambda device: True)
    hidden, head, labels, teacher = tensors(dtype=dtype)
    before, seen, multiply = setting.fp32_precision, [], headmodule.product

    def product(*given: Tensor) -> Tensor:
        seen.append(setting.fp32_precision)
        return multiply(*given)

    monkeypatch.setattr(headmodule, "product", product)
    head_loss(hidden, head, labels, teacher, ALL)
    topk.top_k(teacher.hidden, teacher.head, 3)
    assert set(seen) == {"bf16" if dtype == torch.bfloat16 else before}
    assert len(seen) == 3
