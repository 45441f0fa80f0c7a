"""Losses at the output head on CUDA, where half-precision products come out in float32."""

import pytest
import torch
from torch import Tensor

from compressllm.recover.head import Head
from compressllm.recover.headchunks import TeacherHidden, TeacherTopK
from compressllm.recover.headloss import head_loss
from compressllm.recover.losses import LossWeights
from compressllm.recover.topk import top_k

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
T, V, D = 300, 5000, 64


def tensors(dtype: torch.dtype, device: str) -> tuple[Tensor, Head, Tensor, TeacherHidden]:
    """Values that bfloat16 holds exactly, in another dtype."""
    random = torch.Generator().manual_seed(0)
    hidden, ours, other, theirs = (
        torch.randn(*shape, generator=random).bfloat16().to(device, dtype) for shape in ((T, D), (V, D), (T, D), (V, D))
    )
    labels = torch.randint(0, V, (T,), generator=random)
    labels[:9] = -100
    return hidden.requires_grad_(), Head(ours.requires_grad_()), labels.to(device), TeacherHidden(other, Head(theirs))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weights", [LossWeights(kl=1.0), LossWeights(ce=0.3, kl=0.7, reverse_kl=0.2)], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_bfloat16_is_as_close_as_rounding_its_gradient_allows(
    weights: LossWeights, temperature: float, cached: bool
) -> None:
    results = []
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cuda")):
        hidden, head, labels, teacher = tensors(dtype, device)
        answer: TeacherHidden | TeacherTopK = top_k(teacher.hidden, teacher.head, 16) if cached else teacher
        loss, _ = head_loss(hidden, head, labels, answer, weights, temperature, chunk=128)
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.weight.grad))
    (exact, *wanted), (loss, *got) = results
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-4)
    for one, want in zip(got, wanted, strict=True):
        error = (one.cpu().double() - want).norm() / want.norm()
        assert float(error) < 0.01
