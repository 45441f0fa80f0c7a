"""Contextual decoding inside ``model.generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from compressllm.contextual.attach import Contextual
from compressllm.contextual.decode import Counts, Decoding
from compressllm.contextual.sampling import Sampler
from compressllm.core.errors import RecipeError
from compressllm.core.protocols import CORRECTORS, Corrector
from compressllm.core.registry import Spec, build


class ContextualGenerate:
    """What ``model.generate(..., custom_generate=this)`` decodes with.

    Logits processors, stopping criteria and sampling work as ever; one sequence at a time, without padding.

    Args:
        contextual: Attached to the model that is generated with.
        correct: A name from `compressllm list correctors`, {name: {option: value}}, or None for drafts as they are.
        streamer: Given the ids as they come. Here, since ``generate`` keeps its own from custom functions.

    Attributes:
        counts: What the last generation has done.
    """

    def __init__(self, contextual: Contextual, correct: Spec | None = "sirius", streamer: Any = None) -> None:
        self.contextual, self.streamer = contextual, streamer
        self.corrector: Corrector | None = build(CORRECTORS, correct) if correct is not None else None
        self.counts = Counts()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """(1, tokens) ids, prompt included. Raises: RecipeError for what it cannot do, UnsupportedModelError."""
        config = generation_config or model.generation_config
        if model is not self.contextual.model:
            raise RecipeError("custom_generate: is attached to another model; make it of the one that generates")
        mask: Tensor | None = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise RecipeError("contextual decoding takes one prompt without padding; give them in turn")
        if (config.num_beams or 1) > 1:
            raise RecipeError(f"num_beams {config.num_beams}: contextual decoding has no beam search; leave it out")
        decoding = Decoding(
            self.contextual,
            input_ids,
            int(config.max_length) - input_ids.shape[1],
            self.corrector,
            Sampler(drawn=bool(config.do_sample), processors=logits_processor or None),
            end_tokens(config),
            _asking(stopping_criteria, input_ids.device),
        )
        self.counts = decoding.counts
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        for span in decoding.spans():
            for token in span if self.streamer is not None else ():
                self.streamer.put(torch.tensor([token]))
        if self.streamer is not None:
            self.streamer.end()
        return torch.tensor([decoding.tokens], device=input_ids.device)


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """Ids that end a text."""
    ends = config.eos_token_id
    return frozenset(ends if isinstance(ends, list | tuple) else () if ends is None else (ends,))


def _asking(criteria: Any, device: torch.device) -> Callable[[Sequence[int]], bool] | None:
    if not criteria:
        return None
    return lambda tokens: bool(criteria(torch.tensor([list(tokens)], device=device), None).all())
