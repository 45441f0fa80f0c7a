"""TEAL: small inputs of every linear left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compressllm.contextual.inputs import linears_in
from compressllm.contextual.seen import at_quantile, inputs_of, magnitude_table
from compressllm.core.errors import RecipeError
from compressllm.core.protocols import NEURON_SELECTORS, BlockPass

_STEP = 0.05  # of a block's weights, that one step of the allocation leaves out
_LEAP = 0.25  # of one linear's inputs, at most
_MOST = 0.9  # of a block's weights, where the allocation ends


@NEURON_SELECTORS.register("teal")
@dataclass(frozen=True)
class Teal:
    """A set a token of every linear's inputs, attention's too: those above a threshold, calibrated on text.

    Every block reads the same share of its weights. How it is split over the block's linears is found greedily: of
    each linear a few more inputs are left out, and the change that costs least error of the block's output for the
    weights it saves is made, over and over. All of it is kept, so that one calibration serves any density.

    Args:
        allocation: ``greedy``, or ``uniform``: the same share of every linear.

    Source: Liu et al., TEAL, arXiv 2408.14690, algorithm 1. Departures: thresholds are quantiles of ``|x|``, which
    assumes no symmetry; sizes are the model's own; the error is counted per weight saved and in norms over tokens.
    """

    allocation: Literal["greedy", "uniform"] = "greedy"
    level: ClassVar[Literal["prompt", "token", "input"]] = "input"
    calibrated: ClassVar[bool] = True

    def fit(self, blocks: Callable[[], Iterator[BlockPass]]) -> dict[str, Tensor]:
        """Linear name -> quantiles of its inputs' magnitude; and block name -> (steps, linears) fractions left out."""
        fitted: dict[str, Tensor] = {}
        for block in blocks():
            linears = linears_in(block.module, block.name)
            seen = list(inputs_of(block, list(linears.values())))
            tables = {name: magnitude_table([batch[at] for batch in seen], name) for at, name in enumerate(linears)}
            fitted |= tables
            if self.allocation == "greedy":
                fitted[block.name] = _allocate(block, linears, tables)
        return fitted

    def thresholds(self, density: float, fitted: Mapping[str, Tensor]) -> dict[str, float]:
        """Linear name -> threshold."""
        return {
            name: at_quantile(fitted[name], left_out)
            for name, left_out in left_out_of(density, fitted, self.allocation).items()
        }


def left_out_of(density: float, fitted: Mapping[str, Tensor], allocation: str = "greedy") -> dict[str, float]:
    """Linear name -> fraction of its inputs left out, for a fraction of every block's weights to read.

    Raises: RecipeError if the calibration holds no greedy allocation, and that is asked for.
    """
    tables = [name for name, value in fitted.items() if value.dim() == 1]
    if allocation == "uniform" or density >= 1:
        return dict.fromkeys(tables, 1 - density)
    found: dict[str, float] = {}
    for block, steps in fitted.items():
        if steps.dim() == 2:
            names = sorted(name for name in tables if name.startswith(f"{block}."))
            found.update(zip(names, _between(steps, 1 - density), strict=True))
    if found.keys() != set(tables):
        raise RecipeError("neuron selector teal: its calibration is of a uniform allocation; calibrate it anew")
    return found


def _between(steps: Tensor, sparsity: float) -> list[float]:
    """Fractions at a block's sparsity; the first column of ``steps`` is that of each step."""
    reached = steps[:, 0].contiguous()
    after = min(int(torch.searchsorted(reached, torch.tensor(sparsity))), len(steps) - 1)
    before = max(0, after - 1)
    span = float(reached[after] - reached[before])
    share = min(1.0, (sparsity - float(reached[before])) / span) if span else 0.0
    mixed: list[float] = torch.lerp(steps[before, 1:], steps[after, 1:], share).tolist()
    return mixed


def _allocate(block: BlockPass, linears: Mapping[str, nn.Module], tables: Mapping[str, Tensor]) -> Tensor:
    """(steps, 1 + linears): the block's sparsity, and each linear's, after every step."""
    names = sorted(linears)  # the order that a calibration read from a file can be brought into again
    sizes = torch.tensor([float(linears[name].weight.numel()) for name in names])  # type: ignore[operator]
    share = (sizes / sizes.sum()).tolist()
    right = _last_quarter(next(block.outputs()))
    left_out = [0.0] * len(names)
    steps = [[0.0, *left_out]]
    error = 0.0
    while steps[-1][0] < _MOST:
        tried = []
        for at in range(len(names)):
            after = min(1.0, left_out[at] + min(_LEAP, _STEP / share[at]))
            if after == left_out[at]:
                continue
            trial = [*left_out[:at], after, *left_out[at + 1 :]]
            cuts = {name: at_quantile(tables[name], s) for name, s in zip(names, trial, strict=True)}
            with _leaving_out(linears, cuts):
                made = _last_quarter(next(block.outputs()))
            cost = float((made - right).norm(dim=-1).mean())
            tried.append(((cost - error) / (share[at] * (after - left_out[at])), cost, trial))
        _, error, left_out = min(tried)
        steps.append([sum(a * b for a, b in zip(share, left_out, strict=True)), *left_out])
    return torch.tensor(steps)


def _last_quarter(hidden: Tensor) -> Tensor:
    """Where the context is long."""
    return hidden[:, -max(1, hidden.shape[1] // 4) :].float()


class _leaving_out:
    """Have linears leave out inputs up to a threshold, while it is entered."""

    def __init__(self, linears: Mapping[str, nn.Module], cuts: Mapping[str, float]) -> None:
        self._linears, self._cuts = linears, cuts

    def __enter__(self) -> None:
        def masked(module: nn.Module, cut: float) -> Callable[[Tensor], Tensor]:
            return lambda x: type(module).forward(module, x * (x.abs() > cut))

        for name, module in self._linears.items():
            module.forward = masked(module, self._cuts[name])

    def __exit__(self, *_: object) -> None:
        for module in self._linears.values():
            del module.forward
