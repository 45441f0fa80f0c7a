"""Swapper: makes SparseLinears of a model's sparse linears, while it is loaded or in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressllm.core.errors import UnsupportedModelError
from compressllm.core.gathered import Gathered
from compressllm.core.pattern import SparsityPattern
from compressllm.core.quantized import QuantizedWeight, StoredCodes, quantize_absmax, round_to_nearest
from compressllm.kernels.linear import AUTO, PLAIN, Choice, SparseLinear, choose_backend, left_as_it_is, named
from compressllm.kernels.measured import Timings


class Swapper:
    """Makes SparseLinears of linears one by one: while a model is loaded, so that it is never in memory dense.

    A linear for which the dense backend is chosen stays the nn.Linear it is, if its inputs are not to be rounded.

    Args:
        masks: Linear name -> (out, in) bool mask.
        patterns: Linear name -> what its mask obeys.
        backend: A backend's name, or ``auto``.
        other: Name -> form, of the linears that are no nn.Linear; no backend runs them, and they stay as they are.
        timings, keep_dense: As `choose_backend` takes them.
        bits: Round the weights to 8 or 4 bits as they come, each group to its largest; None leaves them as they are.
        group: Inputs that share a scale then.
        quantized: Linear name -> codes that a checkpoint holds. Integers are run as they are; what has no kernel, as
            float8, is run as the plain weight that was loaded. If their scheme is dynamic, inputs are rounded.
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
        quantized: Mapping[str, StoredCodes] | None = None,
    ) -> None:
        self._masks, self._patterns, self._backend = masks, patterns, backend
        self._timings, self._keep_dense = timings, keep_dense
        self._bits, self._group = bits, group
        self._dynamic = {name: one.scheme for name, one in (quantized or {}).items() if one.scheme.dynamic}
        self._stored = {name: one for name, one in (quantized or {}).items() if not one.scheme.float8}
        #: Linear name -> what was chosen, of those that were handed in so far and those that no backend can run.
        self.choices = {n: left_as_it_is(n, form, backend) for n, form in (other or {}).items() if n in masks}
        #: Names of the linears that backends are chosen for.
        self.sparse = [name for name in masks if name not in self.choices]

    def choose_ahead(
        self, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Choice]:
        """What is chosen for every kind of sparse linear, so that it is measured before any weight is in memory.

        Args:
            shapes: Linear name -> (out, in).

        Returns: Kind, ``4096x4096 2:4``, -> the choice for a weight of zeros.
        """
        choices = {}
        schemes = {name: stored.scheme for name, stored in self._stored.items()}
        kinds = {(shapes[name], _measured(self._patterns[name]), schemes.get(name)) for name in self.sparse}
        for shape, pattern, scheme in sorted(kinds, key=str):
            plain = torch.zeros(shape, dtype=dtype, device=device)
            zeros = round_to_nearest(plain, plain != 0, scheme) if scheme else self._rounded(plain, None, pattern)
            kind = f"{shape[0]}x{shape[1]} {pattern}" + (f" {scheme}" if scheme else "")
            with named(kind):
                choices[kind] = self._choose(zeros, pattern)
        return choices

    def choose(self, name: str, linear: nn.Linear) -> Choice:
        """What is chosen for a sparse linear; kept in ``choices``. Raises BackendUnavailableError, naming it."""
        with named(name):
            self.choices[name] = self._choose(self._weight(name, linear), self._patterns[name])
        return self.choices[name]

    def __call__(self, name: str, linear: nn.Linear) -> nn.Module:
        """What is to stand in the place of a linear whose weight has been loaded: itself, if it is not sparse.

        Raises: BackendUnavailableError, PatternError, naming the linear.
        """
        if name not in self._masks:
            return linear
        pattern, keep = self._patterns[name], self._masks[name]
        with named(name):
            weight = self._weight(name, linear)
            choice = self.choices[name] = self._choose(weight, pattern)
            scheme = self._dynamic.get(name)
            if choice.name == PLAIN and weight is linear.weight and scheme is None:
                return linear
            return SparseLinear(weight, keep, linear.bias, pattern, choice.name, choice.dense_from, scheme)

    def _choose(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern) -> Choice:
        return choose_backend(weight, pattern, self._backend, self._timings, self._keep_dense)

    def _weight(self, name: str, linear: nn.Linear) -> Tensor | QuantizedWeight:
        if name in self._stored:
            return self._stored[name].read().to(linear.weight.device).to(linear.weight.dtype)
        return self._rounded(linear.weight, self._masks[name], self._patterns[name])

    def _rounded(self, weight: Tensor, keep: Tensor | None, pattern: SparsityPattern) -> Tensor | QuantizedWeight:
        if self._bits is None:
            return weight
        weight = weight.detach()
        order = pattern.places.to(weight.device) if isinstance(pattern, Gathered) else None
        return quantize_absmax(weight, weight != 0 if keep is None else keep, self._bits, self._group, order)


def _measured(pattern: SparsityPattern) -> SparsityPattern:
    """What is measured for a pattern: in whichever order, the kernel is the same."""
    return pattern.base if isinstance(pattern, Gathered) else pattern


def swap_linears_(model: nn.Module, swapper: Swapper) -> dict[str, Choice]:
    """Replace the sparse linears of a model that is in memory. Changes it in place.

    Returns: Linear name -> what was chosen, and why others were not.

    Raises: BackendUnavailableError or UnsupportedModelError, naming the linear, and nothing is swapped; PatternError if
        a mask does not fit its weight.
    """
    modules = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    for name in swapper.sparse:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "no module of the model" if linear is None else f"a {type(linear).__name__}"
            raise UnsupportedModelError(f"{name}: has a mask but is {found}; only an nn.Linear can be swapped")
        linears[name] = linear
        swapper.choose(name, linear)
    modules.clear()
    for name in list(linears):
        linear = linears.pop(name)  # so that its weight is freed before the next one is packed
        model.set_submodule(name, swapper(name, linear))
    return swapper.choices
