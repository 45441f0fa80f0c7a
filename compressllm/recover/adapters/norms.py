"""Bias-norm: only biases and norms are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import ADAPTERS


@ADAPTERS.register("bias-norm")
@dataclass(frozen=True)
class BiasNorm:
    """Train biases and norms only, a few parameters in ten thousand; every zero stays where it is.

    Source: Zimmer et al., PERP, 2023.
    """

    def attach_(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Freeze every other parameter. Raises RecipeError if the model has neither biases nor norms."""
        if all(parameter.dim() != 1 for parameter in model.parameters()):
            raise RecipeError("the model has neither biases nor norms with weights to train; use adapter masklora")
        model.requires_grad_(False)
        train_vectors_(model)

    def merge_(self, model: nn.Module) -> None:
        """Nothing: what was trained is where it belongs."""


def train_vectors_(model: nn.Module) -> None:
    """Unfreeze the parameters of one dimension, which are biases and the weights of norms."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.requires_grad_(True)
