"""Join the processes that ``torchrun`` or ``accelerate launch`` started together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from compressllm.core.errors import BackendUnavailableError, CompressError, RankError, RunError
from compressllm.core.ranks import ALONE, Ranks

T = TypeVar("T")

#: How long processes may be late for the start.
JOINING = timedelta(minutes=5)
#: How long one may keep the others waiting: the first may be at a stage that is its alone. One that dies is noticed
#: at once, by its closed connections; this bounds the wait for one that hangs.
WAITING = timedelta(days=1)


def launched_rank() -> int:
    """The rank of this process in its launch; 0 without a launcher.

    Raises: RunError if the launcher's environment is not sound.
    """
    rank, size = _whole_number("RANK", 0), _whole_number("WORLD_SIZE", 1)
    if rank >= size:
        raise RunError(f"RANK is {rank} where WORLD_SIZE is {size}; start with torchrun or accelerate launch")
    return rank


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The ranks of this launch, joined for as long as the context lasts; `ALONE` without a launcher.

    A rank that leaves with an error tells the others, which raise RankError where they next meet; the ranks of a
    context that ends well end it together. A process group that is there already is used and left as it is.

    Raises: RunError if the launcher's environment is not sound or a process does not join in five minutes.
    """
    launched_rank()
    if (dist.get_world_size() if dist.is_initialized() else _whole_number("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    ranks = _join()
    try:
        try:
            yield ranks
        except RankError:
            raise
        except Exception as error:
            ranks.tell(error)
            raise
        ranks.exchange(None)
    finally:
        ranks.leave()


class LaunchedRanks(Ranks):
    """Ranks that meet through torch.distributed: gloo for CPU tensors and plain data, NCCL for CUDA tensors.

    Args:
        group: Their process group, ended by `leave`; None for the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = group
        self._lost = False

    def exchange(self, value: T) -> list[T]:
        """What each rank gave, by rank."""
        return cast(list[T], self._meet("exchange", value))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        self._meet("sum", [tuple(tensor.shape) for tensor in tensors])
        with self._contact(), torch.inference_mode():  # tensors made in that mode may be changed in it only
            for tensor in tensors:
                if tensor.numel():
                    dist.all_reduce(tensor, group=self._group)

    def copy_from_(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Replace each tensor by the one of the rank beside it."""
        self._meet("copy", [(source, tuple(tensor.shape)) for source, tensor in tensors])
        with self._contact(), torch.inference_mode():
            for source, tensor in tensors:
                if tensor.numel():
                    dist.broadcast(tensor.view(torch.uint8), src=source, group=self._group)

    def own_device(self, kind: torch.device) -> torch.device:
        """The CUDA device of this process's number on its machine; any other device as it is."""
        if kind.type != "cuda" or kind.index is not None:
            return kind
        local, count = _whole_number("LOCAL_RANK", self.rank), torch.cuda.device_count()
        if local >= count:
            raise BackendUnavailableError(
                f"device cuda: process {local} of its machine finds {count} of them, and each needs its own; "
                "launch fewer processes, or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        return device

    def tell(self, error: Exception) -> None:
        """Let the other ranks know, where they next meet, that this one has failed."""
        if self._lost or self.told:
            return
        with suppress(CompressError):  # some other has failed as well
            self._meet("failure", _told(error), failed=True)

    def leave(self) -> None:
        """End the process group; after a failure, once all ranks are this far."""
        if self.told and not self._lost:
            # A launcher ends all processes as soon as one has failed, and the first may have a folder to clear away.
            with suppress(RuntimeError):
                dist.all_gather_object([None] * self.size, None, group=self._group)
        dist.destroy_process_group(self._group)

    def _meet(self, what: str, value: Any, failed: bool = False) -> list[Any]:
        """Exchange (what is going on, whether this rank has failed, a value) and return the values, by rank."""
        met: list[Any] = [None] * self.size
        with self._contact():
            dist.all_gather_object(met, (what, failed, value), group=self._group)
        for rank, (_, other_failed, message) in enumerate(met):
            if other_failed:
                self.told = True
                raise RankError(f"rank {rank}: {message}")
        # Sums and copies give their shapes as the value.
        wanted = [(name, None if name == "exchange" else given) for name, _, given in met]
        if wanted.count(wanted[0]) != self.size:
            self._lost = True
            raise RunError(
                f"rank {self.rank}: the processes are out of step, at {', '.join(name for name, _ in wanted)}; "
                "start all of them with the same command"
            )
        return [given for _, _, given in met]

    @contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all of torch.distributed's errors are
            self._lost = True
            reason = (str(error).splitlines() or [""])[0]
            raise RunError(f"rank {self.rank}: lost contact with the other processes: {reason}") from error


def _join() -> LaunchedRanks:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if dist.is_initialized():
        return LaunchedRanks(dist.new_group(backend=backend, timeout=WAITING))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise RunError(f"WORLD_SIZE is set and {missing[0]} is not; start with torchrun or accelerate launch")
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAITING)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"rank {launched_rank()}: could not join the other processes: {reason}") from error
    return LaunchedRanks(None)


def _told(error: Exception) -> str:
    """The failure in one line, as the other ranks show it."""
    if isinstance(error, CompressError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise RunError(f"{name} is {text!r}, not a whole number; start with torchrun or accelerate launch")
    return int(text) if text else default
