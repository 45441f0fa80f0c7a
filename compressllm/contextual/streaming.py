"""A prompt continued by contextual decoding, its text given out as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compressllm.contextual.attach import Contextual
from compressllm.contextual.decode import Decoding
from compressllm.contextual.density import effective_density, measured_density, read_density
from compressllm.contextual.generate import end_tokens
from compressllm.contextual.sampling import Sampler
from compressllm.core.protocols import Corrector
from compressllm.models.prompting import encode_prompt


@dataclass
class Stream:
    """One continuation, to be iterated over once for its pieces of text; then it knows how it went.

    Args:
        contextual: Attached to the model.
        tokenizer: The model's.
        corrector: None drafts without checks.
    """

    contextual: Contextual
    tokenizer: PreTrainedTokenizerBase
    corrector: Corrector | None
    decoding: Decoding | None = None
    text: str = ""

    def pieces(
        self, prompt: str, max_new_tokens: int, temperature: float | None = None, seed: int = 0, chat: bool = False
    ) -> Iterator[str]:
        """Text as soon as no later token can change it. Raises: as `Decoding` and `encode_prompt`."""
        ids = encode_prompt(self.tokenizer, prompt, chat).to(self.contextual.model.device)
        torch.manual_seed(seed)
        sampler = Sampler(drawn=bool(temperature), temperature=temperature or 1.0)
        ends = end_tokens(self.contextual.model.generation_config)
        self.contextual.reset_counts()
        decoding = self.decoding = Decoding(self.contextual, ids, max_new_tokens, self.corrector, sampler, ends)
        for _ in decoding.spans():
            new = decoding.tokens[ids.shape[1] :]
            text = str(self.tokenizer.decode(new, skip_special_tokens=True))
            if not text.endswith("�") or decoding.done:  # or it is a part of a character
                yield text[len(self.text) :]
                self.text = text

    def facts(self) -> dict[str, Any]:
        """Tokens, speed, mean advance and densities, once it is over."""
        if self.decoding is None:
            return {}
        counts, read = self.decoding.counts, read_density(self.contextual)
        advance = counts.advance_length() or counts.advance_length(all_cycles=True)
        facts: dict[str, Any] = {
            "tokens": counts.tokens,
            "tokens_per_second": counts.tokens_per_second(),
            "prompt_seconds": counts.prompt_seconds,
            "read_density": read,
            "effective_density": measured_density(counts, read),
            "advance_length": advance if self.corrector else None,
        }
        if self.corrector and advance:
            facts["effective_density_formula"] = effective_density(self.corrector.period, read, advance)
        return facts
