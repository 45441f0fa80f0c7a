"""A student's losses beside its teacher's answers."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, OPTConfig, PreTrainedModel

from compressllm.core.errors import RecipeError, UnsupportedModelError
from compressllm.models.bundle import Bundle
from compressllm.recover.conversation import Encoded
from compressllm.recover.guide import CacheOptions, Guide, make_guide
from compressllm.recover.head import head_of, hidden_states
from compressllm.recover.headloss import head_loss
from compressllm.recover.losses import LossWeights
from compressllm.recover.packing import pack_records
from compressllm.recover.teacher import ResidentTeacher, check_tokenizers, open_teacher
from compressllm.recover.textdata import TextRows, next_tokens

TINY = Path(__file__).parents[2] / "tiny" / "model"
CPU = torch.device("cpu")


def forward_of(model: PreTrainedModel) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    head = head_of(model)

    def forward(
        batch: Mapping[str, Tensor], teacher: object, weights: LossWeights, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = hidden_states(model, batch).flatten(0, 1)
        return head_loss(hidden, head, batch["labels"].flatten(), teacher, weights, denominator=denominator)

    return forward


@pytest.fixture
def batch(windows: Tensor) -> dict[str, Tensor]:
    labels = next_tokens(windows)
    labels[2, :9] = -100
    return {"input_ids": windows, "labels": labels}


@pytest.fixture
def pair(llama: PreTrainedModel) -> tuple[PreTrainedModel, ResidentTeacher]:
    """A student to be trained, and the teacher it was made from."""
    teacher = ResidentTeacher(Bundle(copy.deepcopy(llama)), CPU, torch.float32)
    llama.requires_grad_(True)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return llama, teacher


def test_losses_are_those_of_both_models_outputs(
    pair: tuple[PreTrainedModel, ResidentTeacher], batch: dict[str, Tensor]
) -> None:
    student, teacher = pair
    weights = LossWeights(ce=0.5, kl=1.0, squarehead=2.0)
    guide = Guide(weights, teacher, blocks=student.model.layers)
    count = int((batch["labels"] != -100).sum())
    loss, parts = guide.loss(forward_of(student), batch, count)

    ours = student(input_ids=batch["input_ids"])
    theirs = teacher.model(input_ids=batch["input_ids"])
    valid = batch["labels"] != -100
    q, p = (one.logits[valid].log_softmax(-1) for one in (ours, theirs))
    torch.testing.assert_close(parts["kl"], (p.exp() * (p - q)).sum(-1).mean().detach())
    torch.testing.assert_close(parts["ce"], -q.gather(1, batch["labels"][valid].unsqueeze(1)).mean().detach())
    assert parts["squarehead"] > 0
    torch.testing.assert_close(loss.detach(), 0.5 * parts["ce"] + parts["kl"] + 2 * parts["squarehead"])
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(llama: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    teacher = ResidentTeacher(Bundle(copy.deepcopy(llama)), CPU, torch.float32)
    llama.requires_grad_(True)
    guide = Guide(LossWeights(kl=1.0, squarehead=1.0), teacher, blocks=llama.model.layers)
    _, parts = guide.loss(forward_of(llama), batch, 10)
    assert float(parts["kl"]) == float(parts["squarehead"]) == 0.0


def test_micro_batches_add_up(pair: tuple[PreTrainedModel, ResidentTeacher], batch: dict[str, Tensor]) -> None:
    student, teacher = pair
    guide = Guide(LossWeights(kl=1.0), teacher, blocks=student.model.layers)
    count = int((batch["labels"] != -100).sum())
    whole, _ = guide.loss(forward_of(student), batch, count)
    pieces = [{key: value[at] for key, value in batch.items()} for at in (slice(0, 3), slice(3, 7))]
    total = sum(guide.loss(forward_of(student), piece, count)[0] for piece in pieces)
    torch.testing.assert_close(total, whole)


def test_a_teacher_is_loaded_only_if_a_loss_looks_at_it(llama: PreTrainedModel) -> None:
    bundle = Bundle(llama)
    assert make_guide(LossWeights(ce=1.0), "no-such-model/anywhere", bundle, llama, CPU, torch.float32).teacher is None
    with pytest.raises(RecipeError, match="losses kl=1: need a teacher"):
        make_guide(LossWeights(kl=1.0), None, bundle, llama, CPU, torch.float32)


def test_a_folder_becomes_a_teacher(llama: PreTrainedModel, tiny_llama_folder: Path, windows: Tensor) -> None:
    guide = make_guide(
        LossWeights(kl=1.0, squarehead=1.0), str(tiny_llama_folder), Bundle(llama), llama, CPU, torch.float32
    )
    answer = guide.teacher({"input_ids": windows, "labels": windows}, blocks=True)
    torch.testing.assert_close(
        answer.head.head.logits_(answer.head.hidden, torch.empty(7 * 16, 64)).view(7, 16, 64),
        guide.teacher.model(input_ids=windows).logits,
    )
    assert len(answer.blocks) == 3
    assert not any(parameter.requires_grad for parameter in guide.teacher.model.parameters())


def test_refuses_a_teacher_that_does_not_fit(
    tiny_llama_folder: Path, build_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    larger = build_model(LlamaConfig(**shape, vocab_size=65, num_hidden_layers=3))
    with pytest.raises(RecipeError, match="has 64 token embeddings, the student 65"):
        open_teacher(str(tiny_llama_folder), Bundle(larger))
    deeper = build_model(LlamaConfig(**shape, vocab_size=64, num_hidden_layers=4))
    with pytest.raises(RecipeError, match="student has 4 blocks, the teacher 3"):
        make_guide(LossWeights(squarehead=1.0), str(tiny_llama_folder), Bundle(deeper), deeper, CPU, torch.float32)


def test_refuses_a_teacher_in_which_packed_records_see_each_other(
    build_model: Callable[..., PreTrainedModel], tmp_path: Path, windows: Tensor
) -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = build_model(OPTConfig(**sizes, vocab_size=64, word_embed_proj_dim=32, max_position_embeddings=64))
    opt.save_pretrained(tmp_path)
    packed = pack_records([Encoded([3, 4, 5], [False, True, True])] * 2, 8, pad=0)
    arguments = (LossWeights(kl=1.0), str(tmp_path), Bundle(opt), opt, CPU, torch.float32)
    assert make_guide(*arguments, rows=TextRows(windows.int())).teacher
    for cached in (None, CacheOptions(tmp_path / "cache")):
        with pytest.raises(UnsupportedModelError, match="train with packing off"):
            make_guide(*arguments, rows=packed, cached=cached)


def test_refuses_a_teacher_with_other_tokens() -> None:
    student, teacher = (AutoTokenizer.from_pretrained(TINY) for _ in range(2))
    check_tokenizers(student, teacher, "dense")
    teacher.add_tokens(["<new>"])
    with pytest.raises(RecipeError, match=f"teacher dense: token {len(student)} is '<new>' there and 'none' in"):
        check_tokenizers(student, teacher, "dense")
