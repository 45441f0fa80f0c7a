"""SparseLinear: a linear computed from a packed weight by the backend that suits it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressllm.core.errors import BackendUnavailableError, PatternError
from compressllm.core.gathered import Gathered
from compressllm.core.pattern import SparsityPattern, Unstructured
from compressllm.core.protocols import BACKENDS, Backend
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.registry import build
from compressllm.core.scheme import Scheme
from compressllm.kernels.auto import pick
from compressllm.kernels.measured import Seconds, Timings

AUTO = "auto"
_ROWS = 1024  # checked at once
_FEW_INPUTS = 2048  # gathered at once, as they are: going over to another dtype takes longer
PLAIN = "dense"  # the backend that nn.Linear is as it stands


@dataclass(frozen=True)
class Choice:
    """The backend of one linear.

    Args:
        name: The chosen backend.
        refused: Backend -> why it did not want this weight, or lost; empty if the choice was made by name.
        measured: Backend -> number of tokens -> seconds a call, of those that were held against each other.
        dense_from: Number of tokens from which a dense copy of the weight is used instead; None keeps none.
    """

    name: str
    refused: Mapping[str, str] = field(default_factory=dict)
    measured: Seconds = field(default_factory=dict)
    dense_from: int | None = None


def choose_backend(
    weight: Tensor | QuantizedWeight,
    pattern: SparsityPattern,
    wanted: str = AUTO,
    timings: Timings | None = None,
    keep_dense: bool = False,
) -> Choice:
    """The backend for an (out, in) weight, on the device it is on.

    Args:
        wanted: A backend's name, or ``auto`` for the fastest that does not refuse.
        timings: Tells ``auto`` which is the fastest; without, the highest rank is taken for it.
        keep_dense: Take a backend that is fast at few tokens only, and a dense copy of the weight for many.

    Raises: BackendUnavailableError with the reason if the one asked for cannot run here, or with all reasons if none
        can; RecipeError if there is none of that name.
    """
    weight, pattern, _ = in_its_order(weight, pattern)
    if wanted != AUTO:
        chosen: Backend = build(BACKENDS, wanted)
        if reason := chosen.refuses(weight, pattern, wanted=True):
            able = [n for n in BACKENDS.names() if not build(BACKENDS, n).refuses(weight, pattern, wanted=True)]
            raise BackendUnavailableError(f"backend {wanted}: {reason}; backends that can: {', '.join(able) or 'none'}")
        return Choice(wanted)
    refused: dict[str, str] = {}
    willing: dict[str, int] = {}
    for name in BACKENDS.names():
        backend = build(BACKENDS, name)
        if reason := backend.refuses(weight, pattern):
            refused[name] = reason
        else:
            willing[name] = backend.rank
    if not willing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise BackendUnavailableError(f"no backend wants a {weight.dtype} weight on {weight.device.type}: {reasons}")
    if timings is None or len(willing) == 1:
        return Choice(max(willing, key=lambda name: willing[name]), refused)
    measured = timings.of(weight, pattern, list(willing))
    picked = pick(measured, PLAIN, keep_dense)
    return Choice(picked.name, {**refused, **picked.lost}, measured, picked.dense_from)


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with W held in a backend's packed form.

    Of a gathered pattern it packs the columns in the pattern's order, and takes its inputs in that.

    Its state dict is that of the nn.Linear it replaces, with the weight unpacked, so that a model saves as before;
    load weights before swapping. ``to(device)`` and ``to(dtype)`` work on the packed form.

    Args:
        weight: (out, in), zero wherever ``keep`` is False; plain or quantised.
        keep: (out, in) bool, True = kept.
        bias: (out,) or None.
        pattern: What the mask obeys.
        backend: Name of a registered backend.
        dense_from: Number of tokens from which the dense weight, held as well, is used instead; None holds none.
        scheme: What the weight was rounded to, if the inputs are to be rounded as well: one that is dynamic. Their
            gradient passes through the rounding as if it were none.

    Raises: PatternError if the mask has another shape or prunes a weight that is not zero; RecipeError.
    """

    bias: nn.Parameter | None
    dense: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        keep: Tensor,
        bias: nn.Parameter | None,
        pattern: SparsityPattern,
        backend: str,
        dense_from: int | None = None,
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__()
        if weight.shape != keep.shape:
            raise PatternError(f"mask has shape {tuple(keep.shape)}, its weight {tuple(weight.shape)}")
        keep = keep.to(weight.device)
        weight = weight if isinstance(weight, QuantizedWeight) else weight.detach()
        values = weight.codes if isinstance(weight, QuantizedWeight) else weight
        if lost := _lost(values, keep):
            raise PatternError(f"{lost} weights are not zero where the mask prunes; apply the mask first")
        self.out_features, self.in_features = weight.shape
        self.pattern = pattern
        dense = None if dense_from is None else weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        weight, _, order = in_its_order(weight, pattern)
        self.register_buffer("order", order, persistent=False)
        keep = keep if order is None else keep.index_select(1, order)
        self.backend = backend
        self._backend: Backend = build(BACKENDS, backend)
        self._parts: list[str] = []
        for part, tensor in self._backend.pack(weight, keep).items():
            self.register_buffer(f"packed_{part}", tensor, persistent=False)
            self._parts.append(part)
        self.rounds = scheme if scheme and scheme.dynamic else None
        self._rounded_by_backend = self._backend.rounds_up_to if isinstance(weight, QuantizedWeight) else 0
        self.dense_from = dense_from
        self.register_buffer("dense", dense, persistent=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, keep: Tensor, pattern: SparsityPattern, backend: str = AUTO
    ) -> SparseLinear:
        """The same function as ``linear``, which is left as it is; the bias is shared.

        Raises: BackendUnavailableError, PatternError, RecipeError.
        """
        return cls(linear.weight, keep, linear.bias, pattern, choose_backend(linear.weight, pattern, backend).name)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The backend's form of the weight."""
        return {part: getattr(self, f"packed_{part}") for part in self._parts}

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight, unpacked at every access, bit for bit."""
        weight = self._backend.unpack(self.packed, self.in_features)
        return weight if self.order is None else weight.index_select(1, self.order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        many = self.dense_from is not None and x.numel() >= self.dense_from * self.in_features
        if self.rounds is not None and (many or x.numel() > self._rounded_by_backend * self.in_features):
            rounded = self.rounds.round_tokens(x.detach())
            x = x + (rounded - x.detach()) if x.requires_grad and torch.is_grad_enabled() else rounded
        if self.dense is not None and many:
            return functional.linear(x, self.dense, self.bias)
        if self.order is not None:
            x = _gathered(x, self.order)
        return self._backend.linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, backend={self.backend}" + (f", inputs as {self.rounds}" if self.rounds else "")
        )

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


def in_its_order(
    weight: Tensor | QuantizedWeight, pattern: SparsityPattern
) -> tuple[Tensor | QuantizedWeight, SparsityPattern, Tensor | None]:
    """An (out, in) weight as a backend packs it, what it obeys so, and the (in,) order its inputs are gathered in.

    That is the weight itself and None but for a gathered pattern; and for that too if its inputs share scales in
    groups that lie otherwise and that order would tear apart: backends then find no N:M in it.
    """
    gathered = pattern if isinstance(pattern, Gathered) else None
    if isinstance(weight, QuantizedWeight):
        order = weight.order
        if order is None and gathered and weight.group == weight.shape[1]:
            order = gathered.places.to(weight.device)
        if order is None:
            return weight, pattern, None
        fits = gathered is not None and gathered.order == tuple(order.tolist())
        return weight.in_order(order), gathered.base if gathered and fits else Unstructured(pattern.sparsity), order
    if gathered is None:
        return weight, pattern, None
    order = gathered.places.to(weight.device)
    return weight.detach().index_select(1, order), gathered.base, order


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    """(..., in) in an order. Of 4 bytes torch moves elements five times as fast as of 2, on CPUs."""
    if x.device.type != "cpu" or x.dtype.itemsize != 2 or x.numel() <= _FEW_INPUTS:
        return x.index_select(-1, order)
    return x.float().index_select(-1, order).to(x.dtype)


def _lost(weight: Tensor, keep: Tensor) -> int:
    """How many weights are not zero where the mask prunes. A few rows at a time: a head may have 128 thousand."""
    parts = zip(torch.split(weight, _ROWS), torch.split(keep, _ROWS), strict=True)
    return sum(int(((values != 0) & ~kept).count_nonzero()) for values, kept in parts)


def left_as_it_is(name: str, form: str, wanted: str) -> Choice:
    """The choice for a linear that is no nn.Linear. Raises BackendUnavailableError if another was asked for."""
    reason = f"is {form}; only an nn.Linear can be swapped"
    if wanted not in {AUTO, PLAIN}:
        raise BackendUnavailableError(f"{name}: backend {wanted}: {reason}; backends that can: {PLAIN}")
    return Choice(PLAIN, {} if wanted == PLAIN else {n: reason for n in BACKENDS.names() if n != PLAIN})


@contextlib.contextmanager
def named(linear: str) -> Iterator[None]:
    """Put a linear's name before the errors of the block."""
    try:
        yield
    except (BackendUnavailableError, PatternError) as error:
        raise type(error)(f"{linear}: {error}") from None
