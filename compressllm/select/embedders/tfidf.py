"""Words by how often a text has them and how few others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.protocols import EMBEDDERS
from compressllm.core.run import Run
from compressllm.select.extra import sklearn_missing


@EMBEDDERS.register("tfidf")
@dataclass(frozen=True)
class Tfidf:
    """Words and pairs of words by TF-IDF, reduced by a truncated SVD; no model at all.

    Args:
        components: Width of the vectors.
        seed: Of the SVD's random start.
    """

    components: int = 256
    seed: int = 0

    def refuses(self) -> str | None:
        """That scikit-learn is not installed."""
        return sklearn_missing()

    def embed(
        self, texts: Sequence[str], hidden: Callable[[Sequence[str]], Tensor], device: torch.device, run: Run
    ) -> Tensor:
        """(n, at most components) float32 of unit rows."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        counts = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, max_features=50_000)
        words = counts.fit_transform(texts)
        width = min(self.components, words.shape[1] - 1)
        reduced = TruncatedSVD(width, random_state=self.seed).fit_transform(words)
        return functional.normalize(torch.from_numpy(reduced).float())
