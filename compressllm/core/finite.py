"""Where in a model numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class _Found(Exception):
    """Ends the forward pass in which it was found."""


def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Path of the first module of ``model`` that gives NaN or infinity in a forward pass; None if none does.

    The innermost is named, since it ends before those around it. What was computed between modules, an attention's
    scores say, shows at the next module it goes through.

    Args:
        forward: Runs the model, once more than would be needed if all were well.
    """
    found: list[str] = []

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point()]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                found.append(path)
                raise _Found

        return look

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules() if path]
    try:
        with torch.no_grad():
            forward()
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def said_of(path: str | None) -> str:
    """``, first in the output of model.layers.3.mlp``, to be put behind what is not finite; nothing of None."""
    return f", first in the output of {path}" if path else ""
