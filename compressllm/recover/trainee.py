"""The student in memory, and what of it is trained: all of it, or an adapter; with branches beside it if asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from compressllm.core.errors import RecipeError
from compressllm.core.protocols import ADAPTERS
from compressllm.core.registry import build
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.linears import held_otherwise
from compressllm.models.tensornames import tensor_names
from compressllm.recover.adapters.trainable import trainable
from compressllm.recover.config import RecoverConfig
from compressllm.recover.held import Held, weights_of
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.packing import check_packing
from compressllm.recover.publish import Trained
from compressllm.recover.sharding import Sharding
from compressllm.recover.slorb import SLoRB
from compressllm.recover.student import Student, checkpoint_activations_


class Trainee:
    """The student as settings have it trained.

    Args:
        bundle: Its weights are read here.
        dtype: What is computed in, and of the parameters.
        seed: Of what an adapter begins with.
        packed: Whether it is to be trained on several records a row, which must not see each other.

    Attributes:
        model: With its weights in memory.
        student: The module whose forward is the loss.
        shapes: Trained parameter -> its whole shape.
        parameters: Trained parameters, sharded.

    Raises: RecipeError, FormatError, UnsupportedModelError.
    """

    def __init__(
        self,
        bundle: Bundle,
        held: Held,
        config: RecoverConfig,
        sharding: Sharding,
        dtype: torch.dtype,
        seed: int,
        packed: bool = False,
    ) -> None:
        self._bundle, self._dtype, self._sharding = bundle, dtype, sharding
        self.model = bundle.live(dtype, sharding.device)
        if packed:
            check_packing(self.model)
        self.model.requires_grad_(True)
        _freeze_(self.model, config.frozen)
        self.student = Student(self.model, config.temperature)
        self._plain = set(dict(self.model.named_parameters()))
        self._adapter = None if config.train == "all" else build(ADAPTERS, config.train, {"seed": seed})
        if self._adapter:
            self._adapter.attach_(self.model, held.masks)
        self._branches = SLoRB(**config.slorb.model_dump()) if config.slorb else None
        if self._branches:
            self._branches.attach_(self.model, held.masks, _weights_before(held, config).__getitem__)
        blocks = find_blocks(self.model).modules
        if config.activation_checkpointing:
            checkpoint_activations_(blocks)
        self.shapes = {name: parameter.shape for name, parameter in trainable(self.model).items()}
        sharding.wrap_(self.student, blocks)
        self.parameters = trainable(self.model)

    def local(self) -> dict[str, Tensor]:
        """Trained parameter -> what this process holds of it, the same memory."""
        return {name: self._sharding.local(parameter.detach()) for name, parameter in self.parameters.items()}

    def take_stored_(self, optimizer: Optimizer) -> None:
        """Begin from the weights as they are stored, where they have been rounded to compute with."""
        checkpoint = self._bundle.checkpoint
        if checkpoint is None or self._dtype == torch.float32:
            return
        special = held_otherwise(self._bundle.model)
        for name, stored in tensor_names(self._bundle.model, checkpoint).items():
            wider = checkpoint.specs[stored].dtype.itemsize > self._dtype.itemsize
            if wider and name in optimizer.weights and name not in special:
                optimizer.weights[name].copy_(self._sharding.rows(checkpoint.read(stored)))

    def finish_(self, optimizer: Optimizer) -> tuple[Trained, dict[str, Any]]:
        """Leave the model with the modules it had: merge an adapter, leave out branches or merge them.

        Returns: The trained values by name, and what the manifest has to say of it.
        """
        facts: dict[str, Any] = {}
        if self._adapter or self._branches:
            for name, parameter in self.parameters.items():
                parameter.data = optimizer.result(name)
            if self._branches:
                facts = self._branches.detach_(self.model)
            if self._adapter:
                self._adapter.merge_(self.model)
            changed = {name if name in self._plain else f"{name.rpartition('.')[0]}.weight" for name in self.parameters}
            return lambda name: self.model.get_parameter(name).detach() if name in changed else None, facts
        if self._branches:
            return lambda name: self.model.get_parameter(name).detach() if name in self.shapes else None, facts
        shapes, sharding = self.shapes, self._sharding
        return lambda name: sharding.whole(optimizer.result(name), shapes[name]) if name in shapes else None, facts


def _weights_before(held: Held, config: RecoverConfig) -> Mapping[str, Tensor]:
    """Linear name -> the weight it had before it was pruned: the teacher's. Raises RecipeError."""
    if config.teacher is None or held.origin == "magnitude":
        raise RecipeError("slorb: begins with what pruning took; give a pruned student, and the dense model as teacher")
    return dict(weights_of(open_bundle(config.teacher), held.linears))


def _freeze_(model: nn.Module, globs: Sequence[str]) -> None:
    """Have parameters of these names not trained. Raises RecipeError for a glob that matches none, or all."""
    parameters = dict(model.named_parameters())
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in parameters):
            raise RecipeError(f"frozen: {glob!r} matches no parameter; names look like {next(iter(parameters))}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(not any(fnmatchcase(name, glob) for glob in globs))
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise RecipeError("frozen: all parameters are; leave some to train")
