"""Ranks: the processes of one launch that do one piece of work together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError, RunError

T = TypeVar("T")


class Ranks(ABC):
    """What one process knows of the others of its launch, and how it meets them.

    All ranks call the same methods in the same order. Every method that meets the others first exchanges how they
    are; where one has failed in the meantime, the others raise RankError with its message instead of waiting for it.
    """

    rank: int
    """Which of them this process is; 0 is the first, which alone writes and speaks."""
    size: int
    """How many there are."""
    told: bool = False
    """Whether all of them know that one has failed."""

    @abstractmethod
    def exchange(self, value: T) -> list[T]:
        """What each rank gave, by rank: plain data, pickled on the way. Raises RankError, RunError."""

    @abstractmethod
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks: the same bits on all of them.

        The tensors are contiguous, in the same order and of the same shapes everywhere. Raises RankError, RunError.
        """

    @abstractmethod
    def copy_from_(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Replace each tensor, in place, by the one that the rank beside it has, bit for bit.

        The tensors are contiguous, in the same order and of the same shapes everywhere. Raises RankError, RunError.
        """

    @abstractmethod
    def own_device(self, kind: torch.device) -> torch.device:
        """The device of a kind that is this rank's own. Raises BackendUnavailableError if there is none for it."""

    def share(self, windows: Tensor) -> Tensor:
        """Of (n, seqlen) windows the contiguous share of this rank; shares differ by one window at most.

        Raises: CalibrationError if there are fewer windows than ranks.
        """
        if len(windows) < self.size:
            raise CalibrationError(
                f"{len(windows)} calibration windows are fewer than the {self.size} processes that share them; "
                "raise calibration.samples, or launch fewer"
            )
        return torch.tensor_split(windows, self.size)[self.rank]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Check that all ranks were given the same. Raises RunError naming what differs."""
        for rank, other in enumerate(self.exchange(dict(facts))):
            if differs := [key for key in facts if other.get(key) != facts[key]]:
                raise RunError(
                    f"rank {min(rank, self.rank)} and rank {max(rank, self.rank)} differ in {', '.join(differs)}; "
                    "start all processes with the same command, on machines that see the same files"
                )

    def first_then_rest(self, make: Callable[[], T]) -> T:
        """What ``make`` gives here; the other ranks call it once the first is through with it."""
        if self.rank:
            self.exchange(None)
            return make()
        made = make()
        self.exchange(None)
        return made


class Alone(Ranks):
    """One process, which nobody launched beside others: every meeting is over at once."""

    rank: int = 0
    size: int = 1

    def exchange(self, value: T) -> list[T]:
        """The value."""
        return [value]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def copy_from_(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Nothing to do."""

    def own_device(self, kind: torch.device) -> torch.device:
        """The device as it is."""
        return kind


#: The ranks of a process that is alone.
ALONE = Alone()
