"""compressllm: make a Hugging Face LLM smaller and faster after training, and prove it.

Importing it imports neither torch nor transformers, and lets transformers load packed checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compressllm.export import autoload

if TYPE_CHECKING:
    from compressllm.eval.perplexity import perplexity as perplexity
    from compressllm.export import export_model as export_model
    from compressllm.models.loading import load_model as load_model
    from compressllm.prune.model import prune_model as prune_model
    from compressllm.quantize.model import quantize_model as quantize_model
    from compressllm.recover.model import recover_model as recover_model
    from compressllm.stages.runner import run_recipe as run_recipe
    from compressllm.stages.sweep import sweep_model as sweep_model

__version__ = "0.1.0"

_HOME_OF = {
    "export_model": "compressllm.export",
    "load_model": "compressllm.models.loading",
    "perplexity": "compressllm.eval.perplexity",
    "prune_model": "compressllm.prune.model",
    "quantize_model": "compressllm.quantize.model",
    "recover_model": "compressllm.recover.model",
    "run_recipe": "compressllm.stages.runner",
    "sweep_model": "compressllm.stages.sweep",
}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


autoload.install()
