"""LinearAdapter: an adapter that puts a few trained parameters beside each masked linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressllm.core.errors import FormatError, RecipeError, UnsupportedModelError
from compressllm.recover.adapters.adapted import AdaptedLinear
from compressllm.recover.adapters.norms import train_vectors_


@dataclass(frozen=True)
class LinearAdapter(ABC):
    """Replaces each masked linear by an `AdaptedLinear`. The rest is frozen, norms and biases excepted.

    Args:
        norms: Train norms and biases too, of the whole model.
        seed: Fixes the initial values; the recipe's unless given.
    """

    norms: bool = True
    seed: int = 0

    @abstractmethod
    def start(self, shape: tuple[int, int], random: torch.Generator) -> dict[str, Tensor]:
        """Name -> initial value of the parameters beside a linear of this (out, in) shape, so that nothing changes.

        Raises: RecipeError if the shape will not do.
        """

    @abstractmethod
    def effective(self, weight: Tensor, keep: Tensor, *small: Tensor) -> Tensor:
        """The (out, in) weight that is computed with, as `adapted.Effective` says."""

    def attach_(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Replace the masked linears and freeze what is not trained. Changes ``model`` in place.

        Args:
            masks: Linear name -> (out, in) bool mask, outside of which the weight is zero.

        Raises: RecipeError if there are no masks or a shape will not do; UnsupportedModelError for a masked linear
            that is no module of its own; FormatError for a mask that does not fit its weight. Nothing is changed then.
        """
        if not masks:
            raise RecipeError("the model has no masked linear to put an adapter beside; prune it first")
        random = torch.Generator().manual_seed(self.seed)
        adapted: dict[str, AdaptedLinear] = {}
        for name in masks:
            linear, keep = _linear(model, name), masks[name]
            _check_mask(name, linear, keep)
            try:
                small = self.start((keep.shape[0], keep.shape[1]), random)
            except RecipeError as error:
                raise RecipeError(f"{name}: {error}") from None
            adapted[name] = AdaptedLinear(linear, keep, self.effective, small)
        model.requires_grad_(False)
        for name, module in adapted.items():
            model.set_submodule(name, module)
        if self.norms:
            train_vectors_(model)

    def merge_(self, model: nn.Module) -> None:
        """Put plain linears back, what was trained merged into their weights. Changes ``model`` in place."""
        for name, module in list(model.named_modules()):
            if isinstance(module, AdaptedLinear):
                model.set_submodule(name, module.merged())


def _linear(model: nn.Module, name: str) -> nn.Linear | Conv1D:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if isinstance(module, nn.Linear | Conv1D):
        return module
    found = "is held together with others in one tensor" if module is None else f"is a {type(module).__name__}"
    raise UnsupportedModelError(f"{name}: {found}; adapters need a linear, train with adapter bias-norm or with none")


def _check_mask(name: str, linear: nn.Linear | Conv1D, keep: Tensor) -> None:
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    if keep.shape != weight.shape:
        raise FormatError(f"{name}: its mask has shape {tuple(keep.shape)}, its weight {tuple(weight.shape)}")
    if lost := int(((weight != 0) & ~keep.to(weight.device)).count_nonzero()):
        raise FormatError(f"{name}: {lost} weights are not zero where its mask prunes; apply the mask first")
