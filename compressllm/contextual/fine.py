"""An MLP whose neurons are chosen for every token, and read where they lie."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compressllm.contextual.control import Control
from compressllm.contextual.mlp import Mlp
from compressllm.contextual.runner import Runner
from compressllm.core.protocols import TokenSelector
from compressllm.kernels.active import active_columns, active_rows

_FEW_TOKENS = 8  # more of them want nearly all neurons between them, and one dense product reads them once


class TokenMlp(Runner):
    """Computes with the neurons that each token's own activations choose.

    Holds a transposed copy of down's weight, whose rows are what a neuron puts out. Packed weights are computed as a
    whole and what was not chosen is left out of the result: right, and no faster.

    Args:
        density: Fraction of neurons to keep.
        fitted: What the selector keeps of its calibration.
    """

    def __init__(
        self, mlp: Mlp, selector: TokenSelector, density: float, fitted: Mapping[str, Tensor], control: Control
    ) -> None:
        super().__init__(mlp.dense, control, mlp.size)
        self.mlp, self._selector, self._density, self._fitted = mlp, selector, density, fitted
        self._gated = selector.gated and mlp.up is not None
        self.packed = any(part is not None and part.packed is not None for part in (mlp.gate, mlp.up, mlp.down))
        self._up = mlp.up.weight.detach() if mlp.up is not None and not self.packed else None
        self._down_t = None if self.packed else mlp.down.weight.detach().t().contiguous()

    def draft(self, x: Tensor) -> Tensor:
        """With the neurons that any of the tokens chose; each token's own are all that it uses."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        a = self.mlp.act(self.mlp.gate(x))
        if self.packed or len(x) > _FEW_TOKENS or self._down_t is None:
            return self._masked(x, a).view(*shape[:-1], -1)
        up = self._up
        if self._gated and up is not None:
            keep, index = self._choice(a)
            u = active_rows(x, up, index)
            if (bias := self.mlp.up.bias if self.mlp.up else None) is not None:
                u = u + bias.index_select(0, index)
            h = a.index_select(1, index) * u
            read = 1 + 2 * len(index) / self.mlp.neurons
        else:
            h = a * self.mlp.up(x) if self.mlp.up is not None else a
            keep, index = self._choice(h)
            h = h.index_select(1, index)
            read = (2 if self.mlp.up is not None else 1) + len(index) / self.mlp.neurons
        if len(x) > 1:
            h = h * keep.index_select(1, index)
        self.count(read / (3 if self.mlp.up is not None else 2))
        y = active_columns(h, self._down_t, index)
        if (bias := self.mlp.down.bias) is not None:
            y = y + bias
        return y.view(*shape[:-1], -1)

    def planned(self) -> float:
        """The share of all weights: what is looked at is read as a whole."""
        if self.packed:
            return 1.0
        if self.mlp.up is None:
            return (1 + self._density) / 2
        return (1 + 2 * self._density) / 3 if self._gated else (2 + self._density) / 3

    def _choice(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, neurons) bool, and the int32 places of what any token keeps."""
        keep = self._selector.keep(values, self._density, self.mlp.name, self._fitted)
        union = keep[0] if len(keep) == 1 else keep.any(0)
        return keep, union.nonzero().view(-1).int()

    def _masked(self, x: Tensor, a: Tensor) -> Tensor:
        h = a * self.mlp.up(x) if self.mlp.up is not None else a
        keep = self._selector.keep(a if self._gated else h, self._density, self.mlp.name, self._fitted)
        self.count(1.0)
        return self.mlp.down(h * keep)
