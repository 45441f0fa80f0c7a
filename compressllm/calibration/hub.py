"""Text sets the papers use, fetched from the Hugging Face hub and cached by `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from compressllm.core.errors import CalibrationError
from compressllm.core.protocols import SOURCES, Split

_ARTICLE = re.compile(r" = [^=].* = \n?")  # " = Title = "; sections have more signs
_C4_EVALUATION_DOCUMENTS: Final = 1100


@SOURCES.register("wikitext2")
@dataclass(frozen=True)
class WikiText2:
    """WikiText-2 raw: calibration from train, evaluation on test. Report no number calibrated on its own train split.

    Source: Salesforce/wikitext, wikitext-2-raw-v1.
    """

    def texts(self, split: Split) -> Iterator[str]:
        """Articles. Joined by two newlines they are the rows joined by two newlines, as the papers tokenise them.

        Raises: CalibrationError if the set cannot be fetched.
        """
        rows = _load("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", _part(split, "train", "test"))
        return join_articles(rows)


@SOURCES.register("c4")
@dataclass(frozen=True)
class C4:
    """C4, English web pages: calibration from the first train shard, evaluation on the first validation shard.

    Source: allenai/c4. Calibration as in SparseGPT and Wanda; evaluation as in their C4 perplexity: 1100
    documents joined by spaces, of which the papers score the first 256 windows.
    """

    def texts(self, split: Split) -> Iterator[str]:
        """Documents; for evaluation a single text. Raises CalibrationError if the set cannot be fetched."""
        name = _part(split, "train", "validation")
        shard = _part(split, "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")
        rows = _load("c4", "allenai/c4", None, name, data_files={name: shard})
        if split == "calibration":
            return rows
        return iter([" ".join(islice(rows, _C4_EVALUATION_DOCUMENTS))])


def join_articles(rows: Iterable[str]) -> Iterator[str]:
    """Join the lines of each WikiText article by two newlines; what stands before the first title comes first."""
    article: list[str] = []
    for row in rows:
        if article and _ARTICLE.fullmatch(row):
            yield "\n\n".join(article)
            article = []
        article.append(row)
    if article:
        yield "\n\n".join(article)


def _part(split: Split, calibration: str, evaluation: str) -> str:
    return calibration if split == "calibration" else evaluation


def _load(source: str, repo: str, config: str | None, split: str, **options: Any) -> Iterator[str]:
    """The ``text`` column, row by row from a memory-mapped cache."""
    # Imported here: it takes seconds, and most runs read local text.
    from datasets import load_dataset

    try:
        rows = load_dataset(repo, config, split=split, **options)
    except Exception as error:  # datasets raises its own, the hub client's, its HTTP library's and OSErrors alike
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CalibrationError(
            f"{source}: cannot fetch {repo} ({reason}); go online, set HF_HOME to a cache that holds it, "
            "or give a path to a local file"
        ) from None
    return (row["text"] for row in rows)
