"""The dense teacher in memory: one forward a batch, without a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from compressllm.core.errors import RecipeError
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.recover.head import Head, head_of, hidden_states
from compressllm.recover.headchunks import TeacherHidden
from compressllm.recover.sharding import Sharding
from compressllm.recover.squarehead import block_outputs


@dataclass(frozen=True, eq=False)
class Answer:
    """What a teacher says of a batch.

    Args:
        head: Its (B * S, d) hidden states, with the head that makes logits of them.
        blocks: (B, S, d) output of each block, front to back; empty unless asked for.
    """

    head: TeacherHidden
    blocks: Sequence[Tensor] = field(default=())


class ResidentTeacher:
    """A dense model that answers every batch anew.

    Args:
        bundle: Its weights are read here; its parameters need no gradient.
        device: Its own, which need not be the student's.
        dtype: Of its weights.
        sharding: How processes share it; all of them then call it together. None has each hold the whole.

    Raises: UnsupportedModelError if its logits are not made by a head we know.
    """

    def __init__(
        self, bundle: Bundle, device: torch.device, dtype: torch.dtype, sharding: Sharding | None = None
    ) -> None:
        self.model = bundle.live(dtype, device).eval().requires_grad_(False)
        self.head: Head = head_of(self.model)
        self._blocks: Iterable[nn.Module] = find_blocks(self.model).modules
        # Shards are gathered into tensors that count their versions, which inference tensors do not.
        shared = sharding is not None and sharding.wrap_frozen_(self._blocks)
        self._without_graph = torch.no_grad if shared else torch.inference_mode

    def __call__(self, batch: Mapping[str, Tensor], blocks: bool = False) -> Answer:
        """Hidden states at all positions of a batch, and the block outputs if asked for.

        Those can be compared under a graph; hidden states may be inference tensors otherwise.
        """
        here = {key: value.to(self.head.weight.device) for key, value in batch.items() if key != "labels"}
        if not blocks:
            with self._without_graph():
                return Answer(TeacherHidden(hidden_states(self.model, here).flatten(0, 1), self.head))
        with torch.no_grad(), block_outputs(self._blocks) as outputs:
            hidden = hidden_states(self.model, here)
        return Answer(TeacherHidden(hidden.flatten(0, 1), self.head), outputs)


def open_teacher(name: str, student: Bundle) -> Bundle:
    """The teacher as a bundle whose weights are still on disk, if it has the student's tokens.

    Args:
        name: Anything `resolve_model` takes.

    Raises: RecipeError if tokenizer or vocabulary differ from the student's; FormatError, UnsupportedModelError.
    """
    teacher = open_bundle(name)
    if teacher.vocab_size != student.vocab_size:
        raise RecipeError(
            f"teacher {name}: has {teacher.vocab_size} token embeddings, the student {student.vocab_size}; "
            "give a teacher of the same vocabulary"
        )
    if teacher.tokenizer is not None and student.tokenizer is not None:
        check_tokenizers(student.tokenizer, teacher.tokenizer, name)
    return teacher


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher to which a token id means another token. Raises RecipeError naming the first that differs."""
    ours, theirs = ({id: token for token, id in one.get_vocab().items()} for one in (student, teacher))
    for id in sorted(ours.keys() | theirs.keys()):
        if ours.get(id) != theirs.get(id):
            raise RecipeError(
                f"teacher {name}: token {id} is {theirs.get(id, 'none')!r} there and {ours.get(id, 'none')!r} in the "
                "student's tokenizer; give a teacher of the same tokenizer"
            )
