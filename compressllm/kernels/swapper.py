"""Swapper: sparse linears made one by one, while a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressllm.core.pattern import SparsityPattern
from compressllm.kernels.linear import AUTO, Choice, choose_backend, left_as_it_is, made, named
from compressllm.kernels.measured import Timings


class Swapper:
    """Makes SparseLinears of linears one by one, while a model is loaded, so that it is never in memory dense.

    Args:
        masks, patterns, backend, other, timings, keep_dense: As `swap_linears_` takes them.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        patterns: Mapping[str, SparsityPattern],
        backend: str = AUTO,
        other: Mapping[str, str] | None = None,
        timings: Timings | None = None,
        keep_dense: bool = False,
    ) -> None:
        self._masks, self._patterns, self._backend = masks, patterns, backend
        self._timings, self._keep_dense = timings, keep_dense
        #: Linear name -> what was chosen, of those that were handed in so far and those that no backend can run.
        self.choices = {n: left_as_it_is(n, form, backend) for n, form in (other or {}).items() if n in masks}

    def choose_ahead(
        self, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Choice]:
        """What is chosen for every kind of sparse linear, so that it is measured before any weight is in memory.

        Args:
            shapes: Linear name -> (out, in).

        Returns: Kind, ``4096x4096 2:4``, -> the choice for a weight of zeros.
        """
        choices = {}
        kinds = {(shapes[name], self._patterns[name]) for name in self._masks if name not in self.choices}
        for shape, pattern in sorted(kinds, key=str):
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            kind = f"{shape[0]}x{shape[1]} {pattern}"
            with named(kind):
                choices[kind] = choose_backend(zeros, pattern, self._backend, self._timings, self._keep_dense)
        return choices

    def __call__(self, name: str, linear: nn.Linear) -> nn.Module:
        """What is to stand in the place of a linear whose weight has been loaded: itself, if it is not sparse.

        Raises: BackendUnavailableError, PatternError, naming the linear.
        """
        if name not in self._masks:
            return linear
        pattern = self._patterns[name]
        with named(name):
            choice = choose_backend(linear.weight, pattern, self._backend, self._timings, self._keep_dense)
            self.choices[name] = choice
            return made(linear, self._masks[name], pattern, choice)
