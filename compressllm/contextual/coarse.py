"""An MLP whose neurons are chosen once a prompt, and gathered into weights of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.contextual.control import Control
from compressllm.contextual.mlp import Mlp, Part
from compressllm.contextual.runner import Runner
from compressllm.core.errors import UnsupportedModelError
from compressllm.core.pattern import NM
from compressllm.core.protocols import PromptScores, PromptSelector
from compressllm.core.quantized import QuantizedWeight
from compressllm.kernels.linear import SparseLinear

_ROUND = 16  # neurons are kept in multiples of this, which vectors and cache lines like


class PromptMlp(Runner):
    """Watches the prompt, then computes with the neurons it was given by `gather`.

    Args:
        density: Fraction of neurons to keep.
    """

    def __init__(self, mlp: Mlp, selector: PromptSelector, density: float, control: Control) -> None:
        super().__init__(mlp.dense, control, mlp.size)
        self.mlp, self._selector = mlp, selector
        # N:M holds along down's inputs: whole groups of them are kept, or the gathered rest would break it.
        down = mlp.down.packed
        self.group = down.pattern.m if down is not None and isinstance(down.pattern, NM) else 1
        self.count_kept = kept_neurons(mlp.neurons, density, self.group)
        self.index: Tensor | None = None
        self._scores: PromptScores | None = None
        self._inner: Callable[[Tensor], Tensor] | None = None
        self._down: Callable[[Tensor], Tensor] | None = None

    def begin(self) -> None:
        """Forget the last prompt."""
        self._scores = None

    @property
    def scores(self) -> PromptScores:
        """What the prompt was scored."""
        if self._scores is None:
            raise RuntimeError("no prompt was seen")
        return self._scores

    def prefill(self, x: Tensor) -> Tensor:
        """Dense, and every neuron scored."""
        h = self.mlp.activations(x)[1]
        tokens = h.reshape(-1, h.shape[-1])
        half = len(tokens) // 2
        first, second = self._selector.score(tokens[:half]), self._selector.score(tokens[half:])
        self._scores = PromptScores(first, first + second, len(tokens))
        return self.mlp.down(h)

    def choose(self, scores: Tensor) -> None:
        """Keep the neurons of the largest scores: of equal ones the first. Changes ``index`` and what is drafted with.

        Args:
            scores: (neurons,).
        """
        grouped = scores.view(-1, self.group).sum(-1)
        order = torch.sort(grouped, descending=True, stable=True).indices[: self.count_kept // self.group]
        kept = order.sort().values
        index = (kept[:, None] * self.group + torch.arange(self.group, device=kept.device)).reshape(-1)
        if self.index is None or not torch.equal(index, self.index):
            self.index = index
            if len(index) < self.mlp.neurons:
                self._gather()

    def draft(self, x: Tensor) -> Tensor:
        """With the gathered neurons; without gathering if they are all."""
        if self.count_kept == self.mlp.neurons:
            self.count(1.0)
            return self.dense(x)
        if self._inner is None or self._down is None:
            raise RuntimeError("no neurons were chosen: put a prompt through the model first")
        self.count(self.planned())
        return self._down(self._inner(x))

    def planned(self) -> float:
        """The kept neurons' share."""
        return self.count_kept / self.mlp.neurons

    def _gather(self) -> None:
        mlp, index = self.mlp, self.index
        if index is None:
            return
        act, up = mlp.act, mlp.up
        if mlp.gate.packed is None and up is not None:  # one product in place of two
            weight = torch.cat([mlp.gate.weight.index_select(0, index), up.weight.index_select(0, index)])
            bias = None
            if mlp.gate.bias is not None and up.bias is not None:
                bias = torch.cat([mlp.gate.bias.index_select(0, index), up.bias.index_select(0, index)])

            def inner(x: Tensor) -> Tensor:
                a, u = functional.linear(x, weight, bias).chunk(2, dim=-1)
                return act(a) * u

            self._inner = inner
        else:
            gate_of, up_of = _rows(mlp.gate, index), _rows(up, index) if up is not None else None
            self._inner = lambda x: act(gate_of(x)) if up_of is None else act(gate_of(x)) * up_of(x)
        self._down = _columns(mlp.down, index)


def kept_neurons(neurons: int, density: float, group: int = 1) -> int:
    """How many of them a density keeps: a multiple of 16 and of ``group``, the nearest, at least one."""
    step = _ROUND if group == 1 or _ROUND % group == 0 else _ROUND * group
    if neurons % step or neurons < 2 * step:
        step = group
    return min(neurons, max(step, round(density * neurons / step) * step))


def _rows(part: Part, index: Tensor) -> Callable[[Tensor], Tensor]:
    weight = part.weight.index_select(0, index)
    bias = part.bias.index_select(0, index) if part.bias is not None else None
    return _linear(weight, bias, part.packed)


def _columns(part: Part, index: Tensor) -> Callable[[Tensor], Tensor]:
    return _linear(part.weight.index_select(1, index).contiguous(), part.bias, part.packed)


def _linear(weight: Tensor, bias: Tensor | None, packed: SparseLinear | None) -> Callable[[Tensor], Tensor]:
    if packed is None:
        return lambda x: functional.linear(x, weight, bias)
    kept = torch.nn.Parameter(bias, requires_grad=False) if bias is not None else None
    return SparseLinear(weight, weight != 0, kept, packed.pattern, packed.backend)


def check_gatherable(mlp: Mlp) -> None:
    """Raise UnsupportedModelError if a weight cannot be gathered without being rounded anew."""
    if mlp.down.packed is not None and mlp.down.packed.order is not None:
        raise UnsupportedModelError(
            f"{mlp.name}: its down projection is {mlp.down.packed.pattern}, and neurons cannot be cut out of an order "
            "of their own; run it with backend dense, or a selector that chooses by token"
        )
    for part in (mlp.gate, mlp.up, mlp.down):
        packed = part.packed if part is not None else None
        blocks = packed.packed.get("blocks") if packed is not None else None
        if isinstance(blocks, QuantizedWeight) or (blocks is not None and blocks.dtype == torch.uint8):
            raise UnsupportedModelError(
                f"{mlp.name}: is quantised, and neurons are gathered from unquantised weights; run the model it was "
                "made from, or a selector that chooses by token"
            )
