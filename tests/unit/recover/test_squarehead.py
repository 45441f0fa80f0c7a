"""SquareHead, against the formula written out."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compressllm.core.errors import RecipeError, UnsupportedModelError
from compressllm.models.blocks import find_blocks
from compressllm.recover.squarehead import block_outputs, check_shape, squarehead

VALID = torch.tensor([[True, True, False], [True, False, False]])


def outputs(seed: int, depth: int = 4) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [(layer + 1) * torch.randn(2, 3, 5, generator=random) for layer in range(depth)]


def slow(student: list[Tensor], teacher: list[Tensor], eps: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        pairs = [(s[b, i].double(), t[b, i].double()) for b in range(2) for i in range(3) if VALID[b, i]]
        distance = sum(float(((x - y) ** 2).mean()) for x, y in pairs) / len(pairs)
        total += distance / (sum(float((y**2).mean()) for _, y in pairs) / len(pairs) + eps)
    return total


def test_is_the_formula() -> None:
    student, teacher = outputs(0), outputs(1)
    assert float(squarehead(student, teacher, VALID)) == pytest.approx(slow(student, teacher, 1e-6) / 4, rel=1e-5)
    exact = squarehead(student, teacher, VALID, paper_exact=True)
    assert float(exact) == pytest.approx(slow(student, teacher, 0.0078125), rel=1e-5)


def test_padding_does_not_count() -> None:
    student, teacher = outputs(0), outputs(1)
    before = squarehead(student, teacher, VALID)
    for one in (*student, *teacher):
        one[~VALID] = torch.nan
    assert torch.equal(squarehead(student, teacher, VALID), before)


def test_is_zero_where_equal_and_does_not_depend_on_scale_or_depth() -> None:
    student, teacher = outputs(0), outputs(1)
    assert float(squarehead(teacher, teacher, VALID)) == 0.0
    before = float(squarehead(student, teacher, VALID))
    scaled = squarehead([100 * s for s in student], [100 * t for t in teacher], VALID)
    assert float(scaled) == pytest.approx(before, rel=1e-4)
    assert float(squarehead(student * 2, teacher * 2, VALID)) == pytest.approx(before)
    tiny = squarehead([1e-2 * s for s in student], [1e-2 * t for t in teacher], VALID)
    assert float(tiny) == pytest.approx(before, rel=0.02)
    swallowed = squarehead([1e-2 * s for s in student], [1e-2 * t for t in teacher], VALID, paper_exact=True) / 4
    assert float(swallowed) < 0.5 * before


def test_gradient_goes_to_the_student_in_half_precision_too() -> None:
    student = [s.bfloat16().requires_grad_() for s in outputs(0)]
    loss = squarehead(student, [t.bfloat16() for t in outputs(1)], VALID)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(s.grad[VALID].abs().min() > 0 and not s.grad[~VALID].any() for s in student)


def test_nothing_valid_is_zero() -> None:
    student = [s.requires_grad_() for s in outputs(0)]
    loss = squarehead(student, outputs(1), torch.zeros_like(VALID))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_keeps_block_outputs_before_the_last_norm(decoder: PreTrainedModel, windows: Tensor) -> None:
    decoder.requires_grad_(True)
    blocks = find_blocks(decoder).modules
    with block_outputs(blocks) as kept:
        hidden = decoder(input_ids=windows, output_hidden_states=True).hidden_states
    assert len(kept) == 3
    for one, expected in zip(kept[:-1], hidden[1:-1], strict=True):
        assert torch.equal(one, expected)
    assert all(one.requires_grad for one in kept)
    hooks = [len(block._forward_hooks) for block in blocks]  # transformers leaves its own there
    with block_outputs(blocks) as again, torch.no_grad():
        decoder(input_ids=windows)
    assert not again[0].requires_grad
    assert torch.equal(again[-1], kept[-1])
    assert [len(block._forward_hooks) for block in blocks] == hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, llama: PreTrainedModel, windows: Tensor) -> None:
    llama.requires_grad_(True)
    blocks = find_blocks(llama).modules
    teacher = [torch.zeros(7, 16, 32) + 0.1] * 3

    def gradient(model: PreTrainedModel) -> Tensor:
        with block_outputs(find_blocks(model).modules) as kept:
            model(input_ids=windows)
        squarehead(kept, teacher, windows > 0).backward()
        assert len(kept) == 3
        return model.model.layers[0].mlp.up_proj.weight.grad

    plain = gradient(copy.deepcopy(llama))
    for block in blocks:
        block.forward = lambda *args, forward=block.forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=reentrant, **kwargs
        )
    if not reentrant:
        torch.testing.assert_close(gradient(llama), plain)
        return
    llama.model.embed_tokens.requires_grad_(False)  # the case in which re-entry silently loses the graph
    with pytest.raises((UnsupportedModelError, ValueError), match=r"no gradient|keyword"):
        gradient(llama)


def test_refuses_another_shape(llama: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match="student has 4 blocks, the teacher 3"):
        squarehead(outputs(0), outputs(1, depth=3), VALID)
    with pytest.raises(RecipeError, match="student is 5 wide, the teacher 4"):
        squarehead(outputs(0), [t[..., :4] for t in outputs(1)], VALID)
    other = copy.deepcopy(llama)
    check_shape(llama, other)
    other.config.hidden_size = 64
    with pytest.raises(RecipeError, match="student is 32 wide, the teacher 64"):
        check_shape(llama, other)
    shorter = copy.deepcopy(llama)
    del shorter.model.layers[2]
    shorter.config.num_hidden_layers = 2
    with pytest.raises(RecipeError, match="student has 3 blocks, the teacher 2"):
        check_shape(llama, shorter)
