"""Gradients of a step, summed over its micro-batches in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn


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

    def clear_(self) -> None:
        """Forget them."""
        self._sums.clear()

    def _take(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient, parameter.grad = self._local(parameter.grad), None
        if name in self._sums:
            self._sums[name].add_(gradient)
        else:
            self._sums[name] = gradient.float()


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
