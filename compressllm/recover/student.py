"""The student as one module whose forward is the loss: what is trained, sharded and measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compressllm.recover.head import head_of, hidden_states
from compressllm.recover.headchunks import Teacher
from compressllm.recover.headloss import head_loss
from compressllm.recover.losses import LossWeights


class Student(nn.Module):
    """A causal language model with the losses at its head.

    The model is left in eval mode: a teacher's answer does not depend on chance, so neither may the student's.

    Args:
        model: Its weights in memory.
        temperature: Of the distillation losses.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model.eval()
        self._head, self._temperature = head_of(model), temperature

    def forward(
        self, batch: Mapping[str, Tensor], teacher: Teacher | None, weights: LossWeights, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss at the head, and each loss without its weight: sums over labels over ``denominator``.

        Args:
            batch: ``input_ids`` and ``labels`` (B, S) and what else the model's forward takes. A label is the token
                that follows its position; `IGNORED` where none is predicted.
        """
        return self.at_head(self.hidden(batch), batch["labels"], teacher, weights, denominator)

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, S, d) what the head is given."""
        return hidden_states(self.model, batch)

    def at_head(
        self, hidden: Tensor, labels: Tensor, teacher: Teacher | None, weights: LossWeights, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` gives, of hidden states."""
        module = self.model.get_output_embeddings()
        # Looked up at every call: sharding puts another tensor there.
        head = replace(self._head, weight=module.weight, bias=getattr(module, "bias", None))
        return head_loss(
            hidden.flatten(0, 1), head, labels.flatten(), teacher, weights, self._temperature,
            denominator=denominator,
        )  # fmt: skip


def checkpoint_activations_(blocks: Iterable[nn.Module]) -> None:
    """Have each block compute its activations again in the backward pass instead of keeping them."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
