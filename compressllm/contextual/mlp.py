"""The MLP of a decoder block, found by what its modules compute rather than by class name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations

import torch
from torch import Tensor, nn

from compressllm.core.errors import UnsupportedModelError
from compressllm.kernels.few import few_tokens
from compressllm.kernels.linear import SparseLinear
from compressllm.models.blocks import DecoderBlocks

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "activation_func")


@dataclass(frozen=True)
class Part:
    """One of an MLP's linears, or a share of the rows of a fused one.

    Args:
        module: An nn.Linear or a SparseLinear.
        rows: First row, and the one after the last, where gate and up are one weight; None for all.
    """

    module: nn.Module
    rows: tuple[int, int] | None = None

    @property
    def weight(self) -> Tensor:
        """(out, in): a view of the parameter, or a packed weight unpacked."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    @property
    def bias(self) -> Tensor | None:
        """(out,)."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias if bias is None or self.rows is None else bias[self.rows[0] : self.rows[1]]

    @property
    def packed(self) -> SparseLinear | None:
        """The module, if its weight is held in a packed form."""
        return self.module if isinstance(self.module, SparseLinear) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.packed is None:
            return few_tokens(x, self.weight, self.bias)
        y = type(self.packed).forward(self.packed, x)
        return y if self.rows is None else y[..., self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Mlp:
    """``down(act(gate x) * up x)``, or ``down(act(gate x))`` without up.

    Args:
        name: Module path of what holds the linears.
        module: That module; the decoder block itself where the linears lie in it directly (OPT).
        gate: (neurons, hidden); of an MLP without gate its first linear.
        up: (neurons, hidden) or None.
        down: (hidden, neurons).
        act: The activation, called past whatever stands in for its module's forward.
        act_module: That module, or None if it is a plain function.
        inline: Whether the linears lie in the block and are called by it one by one.
    """

    name: str
    module: nn.Module
    gate: Part
    up: Part | None
    down: Part
    act: Callable[[Tensor], Tensor]
    act_module: nn.Module | None = None
    inline: bool = False

    @property
    def neurons(self) -> int:
        """Rows of gate."""
        if self.gate.rows:
            return self.gate.rows[1] - self.gate.rows[0]
        return int(self.gate.module.out_features)  # type: ignore[arg-type]

    @property
    def hidden(self) -> int:
        """Inputs of gate."""
        return int(self.gate.module.in_features)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """Weights of all its linears."""
        return (3 if self.up else 2) * self.neurons * self.hidden

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gate's activation and the input of down, of every neuron; one tensor twice if there is no up."""
        a = self.act(self.gate(x))
        return (a, a * self.up(x)) if self.up is not None else (a, a)

    def dense(self, x: Tensor) -> Tensor:
        """What the module computes, whatever stands in for its forward."""
        if self.inline:
            return self.down(self.activations(x)[1])
        return type(self.module).forward(self.module, x)  # type: ignore[no-any-return]


def find_mlps(blocks: DecoderBlocks) -> list[Mlp]:
    """The MLP of every decoder block, front to back.

    Raises: UnsupportedModelError if a block has none, several, or a mixture of experts.
    """
    return [find_mlp(module, blocks.name(index)) for index, module in enumerate(blocks.modules)]


def find_mlp(block: nn.Module, name: str) -> Mlp:
    """The MLP of one decoder block whose weights are in memory. Raises: as `find_mlps`."""
    if any(p.dim() == 3 for p in block.parameters()):
        raise UnsupportedModelError(f"{name}: is a mixture of experts, which already chooses its neurons by token")
    found = []
    for path, module in block.named_modules():
        where = f"{name}.{path}" if path else name
        act = next((getattr(module, one) for one in _ACTIVATIONS if callable(getattr(module, one, None))), None)
        if act is None:
            continue
        linears = [one for one in module.children() if isinstance(one, nn.Linear | SparseLinear)]
        if len(linears) not in (2, 3):
            continue
        inline = module is block
        held = act if isinstance(act, nn.Module) else None
        call = partial(type(act).forward, act) if held is not None else act
        readings = (replace(mlp, act_module=held, inline=inline) for mlp in _readings(where, module, linears, call))
        found += [mlp for mlp in readings if inline or _computes_it(mlp)][:1]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name}: contextual sparsity needs one MLP, down(act(gate x) * up x) or down(act(up x)) with (out, in) "
            f"weights; found {len(found) or 'no such MLP'}"
        )
    return found[0]


def _readings(
    name: str, module: nn.Module, linears: Sequence[nn.Module], act: Callable[[Tensor], Tensor]
) -> Iterator[Mlp]:
    """All that these linears could be."""
    shapes: list[tuple[int, int]] = [(one.out_features, one.in_features) for one in linears]  # type: ignore[misc]
    for order in permutations(range(len(linears))):
        parts, (first, *others) = [Part(linears[at]) for at in order], [shapes[at] for at in order]
        if len(parts) == 3 and first == others[0] == others[1][::-1]:
            yield Mlp(name, module, parts[0], parts[1], parts[2], act)
        elif len(parts) == 2 and first == others[0][::-1]:
            yield Mlp(name, module, parts[0], None, parts[1], act)
        elif len(parts) == 2 and first == (2 * others[0][1], others[0][0]):
            fused, half = parts[0].module, others[0][1]
            for one, other in (((0, half), (half, 2 * half)), ((half, 2 * half), (0, half))):
                yield Mlp(name, module, Part(fused, one), Part(fused, other), parts[1], act)


def _computes_it(mlp: Mlp) -> bool:
    """Whether the module does what the reading says, on two random tokens."""
    weight = mlp.down.weight
    dtype, device = weight.dtype, weight.device
    x = torch.randn(1, 2, mlp.hidden, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    try:
        with torch.inference_mode():
            right, read = mlp.module(x), mlp.down(mlp.activations(x)[1])
    except (TypeError, RuntimeError):  # takes other arguments, as attention does, or the reading has them the wrong way
        return False
    if not isinstance(right, Tensor) or right.shape != read.shape:
        return False
    error = (right.float() - read.float()).abs().max()
    return bool(error <= 64 * torch.finfo(dtype).eps * max(1.0, float(right.abs().max())))
