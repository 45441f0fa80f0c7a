"""Any encoder that the sentence-transformers library loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import EMBEDDERS
from compressllm.core.run import Run
from compressllm.select.batches import in_batches
from compressllm.select.vectorcache import content_key


@EMBEDDERS.register("sentence-transformers")
@dataclass(frozen=True)
class SentenceTransformers:
    """Any encoder that the sentence-transformers library loads, from a folder or the hub.

    Args:
        model: Folder or hub id.
    """

    model: str = "sentence-transformers/all-MiniLM-L6-v2"

    def refuses(self) -> str | None:
        """That the library is not installed."""
        if importlib.util.find_spec("sentence_transformers") is None:
            return "needs the package sentence-transformers; run: pip install sentence-transformers"
        return None

    def embed(
        self, texts: Sequence[str], hidden: Callable[[Sequence[str]], Tensor], device: torch.device, run: Run
    ) -> Tensor:
        """(n, the encoder's width) float32 of unit rows."""
        if reason := self.refuses():
            raise RecipeError(f"embedder sentence-transformers {reason}")
        from sentence_transformers import SentenceTransformer

        try:
            encoder = SentenceTransformer(
                self.model,
                device=str(device),
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},  # a pickle could run code
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(f"embedder sentence-transformers: {self.model}: cannot be loaded: {error}") from None

        def encode(batch: Sequence[int]) -> Tensor:
            made: Tensor = encoder.encode(
                [texts[item] for item in batch],
                batch_size=len(batch),
                convert_to_tensor=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            return made.float().cpu()

        return in_batches(
            encode,
            [len(text) // 4 for text in texts],  # tokens, roughly: enough to put like with like
            [content_key(text) for text in texts],
            encode([0]).shape[1],
            ("embedding", "sentence-transformers", self.model),
            device,
            run,
            "embedding prompts",
        )
