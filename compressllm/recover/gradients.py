"""Gradients of a step, summed over its micro-batches in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

#: Bytes of gradients beside the sums that are held for the sake of speed.
_MOST_BYTES: Final = 4_000_000_000


class Gradients:
    """Gradients of named parameters.

    A parameter that is not float32 hands over each backward pass's gradient as soon as it is there: sums of many
    are then float32 too, and its own is freed before the next parameter's is made.

    Args:
        parameters: Name -> parameter.
        local: Gives the rows of a tensor that this process holds.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], local: Callable[[Tensor], Tensor]) -> None:
        self._parameters, self._local = dict(parameters), local
        self._sums: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}  # the sums of the step before: on a CPU fresh memory costs more than sums do
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(partial(self._take, name))  # type: ignore[no-untyped-call]

    def collect(self) -> dict[str, Tensor]:
        """Name -> gradient, float32; of a parameter that none reached, an expert's say, zeros."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._take(name, parameter)
            elif name not in self._sums:
                self._sums[name] = torch.zeros_like(self._local(parameter.detach()), dtype=torch.float32)
        return self._sums

    def fit(self, copies: int) -> bool:
        """Whether so many sets of them are little enough to be held at once, each of one backward pass."""
        return fit_beside(sum(p.numel() * p.element_size() for p in self._parameters.values()), copies)

    def of(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradients of one loss, apart from the sums; may be called by several threads at once."""
        found = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        return {name: one for name, one in zip(self._parameters, found, strict=True) if one is not None}

    def add_(self, gradients: Mapping[str, Tensor]) -> None:
        """Add what `of` gave to the sums, and take it over."""
        for name, gradient in gradients.items():
            self._add_(name, gradient)

    def clear_(self) -> None:
        """Forget them, those of a backward pass that was broken off too."""
        self._room = {
            name: one
            for name, one in self._sums.items()
            if one.device.type == "cpu" and self._parameters[name].dtype != torch.float32
        }
        self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None

    def _take(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient, parameter.grad = self._local(parameter.grad), None
        self._add_(name, gradient)

    def _add_(self, name: str, gradient: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(gradient)
        elif name in self._room:
            self._sums[name] = self._room.pop(name).copy_(gradient)
        else:
            self._sums[name] = gradient.float()


def fit_beside(size: int, copies: int) -> bool:
    """Whether so many sets of gradients, each of ``size`` bytes, may be held beside their sums."""
    return copies * size <= _MOST_BYTES


def clip_(gradients: Mapping[str, Tensor], largest: float | None, total: Callable[[Tensor], Tensor]) -> float:
    """Scale the gradients down, in place, to a norm of at most ``largest``; returns the norm they had.

    Args:
        total: Sums a scalar over the processes that hold different gradients.
    """
    norms = torch._foreach_norm(list(gradients.values()))
    norm = float(total(torch.stack(norms).square().sum()).sqrt())
    if largest is not None and norm > largest:  # of NaN nothing is true, and the loss has been checked
        torch._foreach_mul_(list(gradients.values()), largest / (norm + 1e-6))
    return norm
