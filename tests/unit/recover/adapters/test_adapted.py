"""AdaptedLinear: gradients are autograd's, and nothing as large as the weight is kept for the backward pass."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from compressllm.core.pattern import NM
from compressllm.core.protocols import ADAPTERS
from compressllm.core.registry import build
from compressllm.recover.adapters.adapted import AdaptedLinear

OUT, IN, RANK = 12, 8, 3


def obvious(name: str, weight: Tensor, keep: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The effective weight, as the sources write it."""
    if name == "masklora":
        return weight + 2.0 * keep * (other @ one)
    if name == "scalelora":
        return weight * (other @ one)
    return weight * (1 + (4.0 / RANK) * torch.repeat_interleave(one, OUT // RANK, dim=0) * other)


OPTIONS = {"masklora": {"rank": RANK, "alpha": 6.0}, "scalelora": {"rank": RANK}, "spp": {"rank": RANK, "alpha": 4.0}}


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[AdaptedLinear, Tensor]:
    torch.manual_seed(3)
    plain = nn.Linear(IN, OUT).to(dtype)
    keep = NM(2, 4).keep(plain.weight.detach().abs())
    plain.weight.data.masked_fill_(~keep, 0.0)
    model = nn.Sequential(plain)
    build(ADAPTERS, {name: OPTIONS[name]}).attach_(model, {"0": keep})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model[0], keep


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_forward_and_gradients_are_those_of_plain_autograd(name: str) -> None:
    adapted, keep = make(name)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(2, 5, OUT, dtype=torch.float64)
    one, other = (p.detach().clone().requires_grad_() for n, p in adapted.named_parameters() if "_" in n)
    bias = adapted.bias.detach().clone().requires_grad_()
    expected = linear(x, obvious(name, adapted.weight.detach(), keep, one, other), bias)
    wanted = torch.autograd.grad((expected * towards).sum(), (x, bias, one, other))

    y = adapted(x)
    small = [p for n, p in adapted.named_parameters() if "_" in n]
    got = torch.autograd.grad((y * towards).sum(), (x, adapted.bias, *small))
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_backward_keeps_nothing_of_the_weights_size_but_the_weight(name: str) -> None:
    adapted, _ = make(name, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted(torch.randn(5, IN, requires_grad=True))
    own = {adapted.weight.data_ptr(), adapted.keep.data_ptr()}
    assert saved
    assert [t.shape for t in saved if t.numel() >= OUT * IN and t.data_ptr() not in own] == []


def test_input_without_gradient_and_checkpointing() -> None:
    adapted, _ = make("masklora", torch.float32)
    x = torch.randn(5, IN)
    adapted(x).sum().backward()
    grads = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    checkpoint(adapted, x, use_reentrant=False).sum().backward()
    assert set(grads) == {"bias", "lora_a", "lora_b"}
    for name, grad in grads.items():
        assert torch.equal(adapted.get_parameter(name).grad, grad)
    assert adapted.weight.grad is None


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_autocast_computes_in_its_dtype_and_keeps_the_gradients_own(name: str) -> None:
    adapted, _ = make(name, torch.float32)
    x = torch.randn(64, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    got = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    adapted(x).square().sum().backward()
    for key, grad in got.items():
        exact = adapted.get_parameter(key).grad
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() <= 0.02 * exact.norm()


def test_bfloat16_weights_are_merged_in_float32() -> None:
    adapted, keep = make("masklora", torch.bfloat16)
    weight, a, b = (adapted.get_parameter(n).detach().float() for n in ("weight", "lora_a", "lora_b"))
    expected = ((weight + 2.0 * (b @ a)) * keep).bfloat16()
    merged = adapted.merged()
    assert torch.equal(merged.weight, expected)
    assert merged.weight.dtype == torch.bfloat16
    assert type(merged) is nn.Linear


def test_ranks_of_scalelora_part() -> None:
    """Begun with equal entries, as published, all ranks get equal gradients and stay one."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    keep = NM(2, 4).keep(model[0].weight.detach().abs())
    model[0].weight.data.masked_fill_(~keep, 0.0)
    build(ADAPTERS, {"scalelora": {"rank": RANK}}).attach_(model, {"0": keep})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(5, IN)).square().sum().backward()
    optimizer.step()
    product = model[0].get_parameter("scale_b") @ model[0].get_parameter("scale_a")
    assert torch.linalg.matrix_rank(product) == RANK
