"""One-shot pruning: which weights of a linear stay, judged by calibration text or none."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressllm.prune.config import PruneConfig as PruneConfig
    from compressllm.prune.model import prune_model as prune_model

_HOME_OF = {"PruneConfig": "compressllm.prune.config", "prune_model": "compressllm.prune.model"}


def __getattr__(name: str) -> Any:
    # Late, because reading a recipe imports this package and must not import transformers.
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
