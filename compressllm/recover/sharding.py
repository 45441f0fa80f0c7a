"""How several processes share one training: each with the whole model, or with a share of every tensor."""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from compressllm.core.errors import RecipeError
from compressllm.core.ranks import Ranks

S = TypeVar("S")


class Sharding(ABC):
    """What one process holds of the student, and how it meets the others. All call the same methods in order."""

    name: str
    loss_scale: float = 1.0
    """What a loss is multiplied by before its backward pass, so that gradients end up as sums over processes."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device

    @abstractmethod
    def wrap_(self, student: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Leave this process only what it holds of the student's parameters."""

    def wrap_frozen_(self, blocks: Iterable[nn.Module]) -> bool:
        """Leave this process only what it holds of the blocks of a model that is not trained; whether it did.

        All processes must then call the model together.
        """
        return False

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """The rows that this process holds of a parameter or its gradient: the same memory."""

    @abstractmethod
    def rows(self, whole: Tensor) -> Tensor:
        """The rows that this process holds of a tensor that it has whole."""

    @abstractmethod
    def whole(self, local: Tensor, shape: Iterable[int]) -> Tensor:
        """The whole tensor, on every process, of rows held as `local` gives them."""

    @abstractmethod
    def sum_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients over the processes, in place, unless the backward pass has."""

    @abstractmethod
    def total_of_shards(self, value: Tensor) -> Tensor:
        """The sum over different rows of a scalar of this process's rows."""

    @abstractmethod
    def sum_over_shards(self, value: S) -> S:
        """The sum over different rows of what was counted of this process's rows, plain data."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes of what each has counted of its own windows; a new tensor."""
        value = value.clone()
        self.ranks.sum_([value])
        return value


class Replicated(Sharding):
    """Every process holds the whole model; gradients are summed once a step."""

    name = "replicated"

    def wrap_(self, student: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Nothing to do."""

    def local(self, tensor: Tensor) -> Tensor:
        """All of it."""
        return tensor

    def rows(self, whole: Tensor) -> Tensor:
        """All of it."""
        return whole

    def whole(self, local: Tensor, shape: Iterable[int]) -> Tensor:
        """It is."""
        return local

    def sum_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum them; on the wire in the order of their names."""
        self.ranks.sum_([gradients[name] for name in sorted(gradients)])

    def total_of_shards(self, value: Tensor) -> Tensor:
        """Every process has all rows."""
        return value

    def sum_over_shards(self, value: S) -> S:
        """Every process has all rows."""
        return value


class FullyShared(Sharding):
    """FSDP2: a process holds some rows of every tensor, and gathers a block's while it is computed.

    Rows are cut along dimension 0, and groups of N:M lie along dimension 1, so the mask of some rows is those rows of
    the mask. What is held of a tensor is known by its name alone: attributes of parameters do not survive.
    """

    name = "fsdp2"

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(ranks, device)
        if ranks.size < 2:
            raise RecipeError("sharding: fsdp2 needs several processes; start them with torchrun or accelerate launch")
        self.loss_scale = float(ranks.size)  # FSDP2 takes means of gradients
        self._mesh = init_device_mesh(device.type, (ranks.size,))

    def wrap_(self, student: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Shard block by block, then what is left."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=self._mesh, mp_policy=policy)
        fully_shard(student, mesh=self._mesh, mp_policy=policy)

    def wrap_frozen_(self, blocks: Iterable[nn.Module]) -> bool:
        """Shard block by block; each is gathered for its own forward. What lies outside blocks stays whole."""
        from torch.distributed.fsdp import fully_shard

        for block in blocks:
            fully_shard(block, mesh=self._mesh, reshard_after_forward=True)
        return True

    def local(self, tensor: Tensor) -> Tensor:
        """The rows of a DTensor."""
        from torch.distributed.tensor import DTensor

        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def rows(self, whole: Tensor) -> Tensor:
        """As FSDP2 cuts them: in equal chunks, of which the last may be short or missing."""
        chunks = torch.chunk(whole, self.ranks.size)
        return chunks[self.ranks.rank] if self.ranks.rank < len(chunks) else whole[:0]

    def whole(self, local: Tensor, shape: Iterable[int]) -> Tensor:
        """Gather the rows."""
        from torch.distributed.tensor import DTensor, Shard

        if local.dtype == torch.bool:  # which not every backend sends
            return self.whole(local.view(torch.uint8), shape).view(torch.bool)
        size = torch.Size(shape)
        stride = torch.empty(size, device="meta").stride()
        sharded = DTensor.from_local(local.contiguous(), self._mesh, [Shard(0)], shape=size, stride=stride)
        return sharded.full_tensor()

    def sum_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        """The backward pass has."""

    def total_of_shards(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        return self.total(value)

    def sum_over_shards(self, value: S) -> S:
        """The sum over the processes."""
        return functools.reduce(operator.add, self.ranks.exchange(value))


def make_sharding(name: str, ranks: Ranks, device: torch.device) -> Sharding:
    """The sharding that settings name. Raises RecipeError if it makes no sense here."""
    return FullyShared(ranks, device) if name == "fsdp2" else Replicated(ranks, device)
