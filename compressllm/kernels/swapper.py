"""Swapper: sparse linears made one by one, while a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressllm.core.pattern import SparsityPattern
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.kernels.linear import AUTO, Choice, SparseLinear, choose_backend, left_as_it_is, made, named
from compressllm.kernels.measured import Timings


class Swapper:
    """Makes SparseLinears of linears one by one, while a model is loaded, so that it is never in memory dense.

    Args:
        masks, patterns, backend, other, timings, keep_dense: As `swap_linears_` takes them.
        bits: Round the weights to 8 or 4 bits as they come, each group to its largest; None leaves them as they are.
        group: Inputs that share a scale then.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        patterns: Mapping[str, SparsityPattern],
        backend: str = AUTO,
        other: Mapping[str, str] | None = None,
        timings: Timings | None = None,
        keep_dense: bool = False,
        bits: int | None = None,
        group: int = 64,
    ) -> None:
        self._masks, self._patterns, self._backend = masks, patterns, backend
        self._timings, self._keep_dense = timings, keep_dense
        self._bits, self._group = bits, group
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
            zeros = self._rounded(torch.zeros(shape, dtype=dtype, device=device), None)
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
        pattern, keep = self._patterns[name], self._masks[name]
        with named(name):
            weight = self._rounded(linear.weight.detach(), keep)
            choice = choose_backend(weight, pattern, self._backend, self._timings, self._keep_dense)
            self.choices[name] = choice
            if self._bits is None:
                return made(linear, keep, pattern, choice)
            return SparseLinear(weight, keep, linear.bias, pattern, choice.name, choice.dense_from)

    def _rounded(self, weight: Tensor, keep: Tensor | None) -> Tensor | QuantizedWeight:
        if self._bits is None:
            return weight
        return quantize_absmax(weight, weight != 0 if keep is None else keep, self._bits, self._group)
