"""SparseLinear: a linear computed from a packed weight by the backend that suits it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from compressllm.core.errors import BackendUnavailableError, PatternError, UnsupportedModelError
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS, Backend
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.registry import build

AUTO = "auto"
_PLAIN = "dense"  # the backend that nn.Linear is as it stands


@dataclass(frozen=True)
class Choice:
    """The backend of one linear.

    Args:
        name: The chosen backend.
        refused: Backend -> why it did not want this weight; empty if the choice was made by name.
    """

    name: str
    refused: Mapping[str, str] = field(default_factory=dict)


def choose_backend(weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: str = AUTO) -> Choice:
    """The backend for an (out, in) weight, on the device it is on.

    Args:
        wanted: A backend's name, or ``auto`` for the fastest that does not refuse.

    Raises: BackendUnavailableError with the reason if the one asked for cannot run here, or with all reasons if none
        can; RecipeError if there is none of that name.
    """
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
    return Choice(max(willing, key=lambda name: willing[name]), refused)


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with W held in a backend's packed form.

    Its state dict is that of the nn.Linear it replaces, with the weight unpacked, so that a model saves as before;
    load weights before swapping. ``to(device)`` and ``to(dtype)`` work on the packed form.

    Args:
        weight: (out, in), zero wherever ``keep`` is False; plain or quantised.
        keep: (out, in) bool, True = kept.
        bias: (out,) or None.
        pattern: What the mask obeys.
        backend: Name of a registered backend.

    Raises: PatternError if the mask has another shape or prunes a weight that is not zero; RecipeError.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        keep: Tensor,
        bias: nn.Parameter | None,
        pattern: SparsityPattern,
        backend: str,
    ) -> None:
        super().__init__()
        if weight.shape != keep.shape:
            raise PatternError(f"mask has shape {tuple(keep.shape)}, its weight {tuple(weight.shape)}")
        keep = keep.to(weight.device)
        weight = weight if isinstance(weight, QuantizedWeight) else weight.detach()
        values = weight.codes if isinstance(weight, QuantizedWeight) else weight
        if lost := int(((values != 0) & ~keep).count_nonzero()):
            raise PatternError(f"{lost} weights are not zero where the mask prunes; apply the mask first")
        self.out_features, self.in_features = weight.shape
        self.pattern = pattern
        self.backend = backend
        self._backend: Backend = build(BACKENDS, backend)
        self._parts: list[str] = []
        for part, tensor in self._backend.pack(weight, keep).items():
            self.register_buffer(f"packed_{part}", tensor, persistent=False)
            self._parts.append(part)
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
        return self._backend.unpack(self.packed, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self._backend.linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, backend={self.backend}"
        )

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


def swap_linears_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    patterns: Mapping[str, SparsityPattern],
    backend: str = AUTO,
    other: Mapping[str, str] | None = None,
) -> dict[str, Choice]:
    """Replace a model's sparse linears by SparseLinear. Changes ``model`` in place.

    A linear for which the dense backend is chosen stays the nn.Linear it is.

    Args:
        masks: Linear name -> (out, in) bool mask.
        patterns: Linear name -> what its mask obeys.
        backend: A backend's name, or ``auto``.
        other: Name -> form, of the linears that are no nn.Linear; no backend runs them, and they stay as they are.

    Returns: Linear name -> what was chosen, and why others were not.

    Raises: BackendUnavailableError or UnsupportedModelError, naming the linear, and nothing is swapped; PatternError if
        a mask does not fit its weight.
    """
    modules = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    choices: dict[str, Choice] = {}
    for name in masks:
        if other and name in other:
            choices[name] = _left_as_it_is(name, other[name], backend)
            continue
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "no module of the model" if linear is None else f"a {type(linear).__name__}"
            raise UnsupportedModelError(f"{name}: has a mask but is {found}; only an nn.Linear can be swapped")
        linears[name] = linear
        with _named(name):
            choices[name] = choose_backend(linear.weight, patterns[name], backend)
    del modules
    for name, choice in choices.items():
        linear = linears.pop(name, None)  # so that its weight is freed before the next one is packed
        if choice.name == _PLAIN or linear is None:
            continue
        with _named(name):
            sparse = SparseLinear.from_linear(linear, masks[name], patterns[name], choice.name)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, sparse)
    return choices


def _left_as_it_is(name: str, form: str, wanted: str) -> Choice:
    reason = f"is {form}; only an nn.Linear can be swapped"
    if wanted not in {AUTO, _PLAIN}:
        raise BackendUnavailableError(f"{name}: backend {wanted}: {reason}; backends that can: {_PLAIN}")
    return Choice(_PLAIN, {} if wanted == _PLAIN else {n: reason for n in BACKENDS.names() if n != _PLAIN})


@contextlib.contextmanager
def _named(linear: str) -> Iterator[None]:
    try:
        yield
    except (BackendUnavailableError, PatternError) as error:
        raise type(error)(f"{linear}: {error}") from None
