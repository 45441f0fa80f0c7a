"""Reconstruction: gradient descent on the weights that stay, one block at a time, towards the dense block's outputs.

Source: sub-block reconstruction as in arXiv 2510.14444 and the regional optimisation of Wanda++ (arXiv 2503.04992);
dense targets from pruned inputs are FISTAPruner's error correction (arXiv 2408.03728).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressllm.calibration.inputs import Call, Enough, Tap, hidden_states
from compressllm.calibration.walker import Block
from compressllm.core.errors import CalibrationError, UnsupportedModelError
from compressllm.core.parallel import map_batches
from compressllm.models.weights import Weights
from compressllm.prune.config import ReconstructConfig


@dataclass(frozen=True)
class Refit:
    """What training one unit came to.

    Args:
        unit: Module path of what was held against its dense output.
        linears: Linears whose weights were trained.
        before: Relative error over all windows when training began.
        after: The same when it was over, with weights rounded as they are stored.
        fallback: Why the weights were left as they had been, or None.
    """

    unit: str
    linears: tuple[str, ...]
    before: float
    after: float
    fallback: str | None = None

    def facts(self) -> dict[str, Any]:
        """What the row of each of the linears says of it."""
        facts = {"reconstruct_unit": self.unit, "reconstruct_before": self.before, "reconstruct_after": self.after}
        return {**facts, **({"reconstruct_fallback": self.fallback} if self.fallback else {})}


def mean_errors(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | int]:
    """How many units the rows of a walk tell of, and the means of their errors before and after."""
    units = {row["reconstruct_unit"]: row for row in rows if "reconstruct_unit" in row}
    if not units:
        return {"units": 0}
    before, after = ([row[f"reconstruct_{when}"] for row in units.values()] for when in ("before", "after"))
    return {"units": len(units), "before": math.fsum(before) / len(units), "after": math.fsum(after) / len(units)}


def tapped(config: ReconstructConfig) -> Callable[[nn.Module], Sequence[str]]:
    """The submodules of a block whose outputs training needs, as `WalkOptions.tapped` takes it."""
    return lambda block: (find_attention(block),) if config.unit == "sublayer" else ()


def find_attention(block: nn.Module) -> str:
    """Name of the one child of a block that is its attention and holds linears.

    Raises: UnsupportedModelError if there is no such child, or more than one.
    """
    found = [
        name
        for name, child in block.named_children()
        if "attn" in name or "attention" in name
        if any(isinstance(module, nn.Linear) for module in child.modules())
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(block).__name__}: needs one attention module to be reconstructed by sublayers, "
            f"found {', '.join(found) or 'none'}; use unit: block"
        )
    return found[0]


def reconstruct_(
    block: Block, masks: Mapping[str, Tensor], weights: Weights, config: ReconstructConfig, seed: int
) -> list[Refit]:
    """Train what stays of a block's pruned linears until its outputs are near the dense ones. Changes the weights.

    Masks stay as they are and pruned weights stay +0.0. The block is trained in float32 and its weights rounded to
    the stored dtype when it is over; a unit that is no better then keeps the weights it had. Training holds four
    float32 copies of the block (weights, gradients, two moments), and on a CPU one more of the gradients a core.

    Every window's gradient is taken on one core and they are summed in order, so on a CPU the result does not depend
    on the number of threads.

    Args:
        block: A block of a walk with targets, its linears pruned.
        masks: Full name of each pruned linear -> (out, in) keep mask. Other linears are left alone.
        seed: With the block's index, gives the order of the windows.

    Returns: What was trained, or nothing if no weight of the block was pruned.

    Raises: CalibrationError if outputs are not finite; UnsupportedModelError.
    """
    if all(bool(keep.all()) for keep in masks.values()):
        return []
    done = []
    left = {name: keep.to(block.device) for name, keep in masks.items()}
    for path in (*tapped(config)(block.module), ""):
        inside = {name: left.pop(name) for name in list(left) if name.startswith(f"{block.name}.{path}".rstrip("."))}
        if inside:
            done.append(_Unit(block, path, inside, weights, config).train_(seed))
    return done


class _Unit:
    """What is trained at once: some linears of a block, towards the output of the block or of one submodule."""

    def __init__(
        self, block: Block, path: str, masks: Mapping[str, Tensor], weights: Weights, config: ReconstructConfig
    ) -> None:
        self._block, self._path, self._masks, self._weights, self._config = block, path, masks, weights, config
        self._name = f"{block.name}.{path}".rstrip(".")
        self._tap = Tap(block.module.get_submodule(path), last=True)

    def train_(self, seed: int) -> Refit:
        """Train, and put the result into the weights if it is better than what was there."""
        with _float32(self._block, self._weights) as (parameters, stored), ExitStack() as stack:
            if self._block.device.type == "cuda":  # the faster kernels add up gradients in any order
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._path:
                stack.enter_context(self._tap)
            trained = self._trained(parameters)
            for parameter in trained.values():
                parameter.requires_grad_()
            before, after, values = self._fit(trained, stored, seed)
        fallback = None
        if not after < before:
            fallback = f"reconstruction took the error from {before:.4g} to {after:.4g}; kept the weights it had"
        else:
            for name, value in values.items():
                self._weights.replace_(name, value)
        return Refit(self._name, tuple(self._masks), before, after if fallback is None else before, fallback)

    def _trained(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The weights of the unit's linears; with ``norms``, also its vectors that belong to no other linear."""
        weights = {f"{name}.weight" for name in self._masks}
        others = self._block.linears.keys() - self._masks.keys()

        def vector(name: str, parameter: nn.Parameter) -> bool:
            inside = self._path == "" or name.startswith(f"{self._name}.")
            return inside and parameter.dim() == 1 and name.rpartition(".")[0] not in others

        return {
            name: parameter
            for name, parameter in parameters.items()
            if name in weights or (self._config.norms and vector(name, parameter))
        }

    def _fit(
        self, trained: dict[str, nn.Parameter], stored: Mapping[str, torch.dtype], seed: int
    ) -> tuple[float, float, dict[str, Tensor]]:
        """Errors before and after, and the trained values, rounded to the dtypes they are stored in."""
        config, block = self._config, self._block
        names, parameters = list(trained), list(trained.values())
        keep = [self._masks.get(name.removesuffix(".weight")) for name in names]
        # Sums are taken in workers, each on one core, here as everywhere: their last bits depend on the threads.
        sizes = list(self._map(lambda i: float(parameters[i].detach().square().mean().sqrt()), range(len(parameters))))
        windows = range(block.windows)
        self._energy = math.fsum(self._map(self._window_energy, windows)) / block.windows
        self._energy = max(self._energy, torch.finfo(torch.float32).tiny)
        before = self._error()

        steps = config.epochs * -(-block.windows // config.batch)
        optimizer = torch.optim.Adam(
            [{"params": [one], "lr": config.learning_rate * size} for one, size in zip(parameters, sizes, strict=True)],
            betas=config.betas,
            foreach=False,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config.warmup))
        if not math.isfinite(before):
            raise CalibrationError(
                f"{self._name}: outputs are not finite; check the checkpoint, or calibrate with --dtype float32"
            )
        for chosen in _batches(block.windows, config.batch, config.epochs, seed + block.index):
            loss, gradients = self._gradients(chosen, parameters)
            if not math.isfinite(loss):
                break
            for parameter, gradient, mask in zip(parameters, gradients, keep, strict=True):
                parameter.grad = gradient if mask is None else gradient.mul_(mask)
            optimizer.step()
            schedule.step()

        values = {}
        for name, parameter, mask in zip(names, parameters, keep, strict=True):
            value = parameter.detach().to(stored[name])
            values[name] = value if mask is None else value.masked_fill(~mask, 0.0)
            parameter.data.copy_(values[name])
        return before, self._error(), values

    def _gradients(self, chosen: Sequence[int], parameters: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Loss and gradients of a batch of windows."""

        def work(window: int) -> tuple[float, Sequence[Tensor]]:
            loss = self._loss(window) / len(chosen)
            return float(loss.detach()), torch.autograd.grad(loss, parameters)

        total = 0.0
        summed: list[Tensor] = []
        for loss, gradients in self._map(work, chosen):
            total += loss
            if not summed:
                summed = list(gradients)
            else:
                for so_far, one in zip(summed, gradients, strict=True):
                    so_far.add_(one)
        return total, summed

    def _error(self) -> float:
        """Mean loss over all windows."""

        def work(window: int) -> float:
            with torch.no_grad():
                return float(self._loss(window))

        return math.fsum(self._map(work, range(self._block.windows))) / self._block.windows

    def _window_energy(self, window: int) -> float:
        return float(self._block.example(window, self._path)[2].square().sum(-1).mean())

    def _loss(self, window: int) -> Tensor:
        """Mean over a window's tokens of squared error over squared target.

        ``mse`` divides all by the mean target, so that every squared error counts the same; ``token`` each by its
        own. The first tokens of a text are often a thousand times larger than others, and all that ``mse`` looks at.
        """
        hidden, call, target = self._block.example(window, self._path)
        error = (self._forward(hidden, call) - target).square().sum(-1)
        if self._config.loss == "mse":
            return error.mean() / self._energy
        return (error / (target.square().sum(-1) + 1e-6 * self._energy)).mean()

    def _forward(self, hidden: Tensor, call: Call) -> Tensor:
        """(1, seqlen, hidden) float32 output of the unit."""
        reduced = self._config.dtype == "bfloat16"
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=reduced):
            try:
                out = call.run(self._block.module, hidden)
            except Enough:
                out = self._tap.take()
        if isinstance(out, tuple):
            out = out[0]
        if reduced and isinstance(out, Tensor):
            out = out.float()
        return hidden_states(out, hidden, self._name)

    def _map(self, work: Callable[[int], Any], items: Sequence[int]) -> Iterator[Any]:
        return map_batches(lambda i: work(items[i]), len(items), self._block.device, first_alone=False)


@contextmanager
def _float32(block: Block, weights: Weights) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, torch.dtype]]]:
    """Put float32 copies in the places of a block's parameters and float buffers.

    Yields the parameters, and the dtypes they are stored in, by full name. The copies are made from what is stored,
    need no gradient, and are gone when the context is left.
    """
    own: list[tuple[dict[str, Any], str, Any]] = []
    copies: dict[str, nn.Parameter] = {}
    stored: dict[str, torch.dtype] = {}
    try:
        for path, module in block.module.named_modules(prefix=block.name):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    own.append((module._parameters, key, parameter))
                    value = weights.read(f"{path}.{key}")
                    stored[f"{path}.{key}"] = value.dtype
                    copy = nn.Parameter(value.to(block.device, torch.float32, copy=True), requires_grad=False)
                    module._parameters[key] = copies[f"{path}.{key}"] = copy
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    own.append((module._buffers, key, buffer))
                    module._buffers[key] = buffer.to(torch.float32, copy=True)
        yield copies, stored
    finally:
        for holder, key, tensor in own:
            holder[key] = tensor


def _batches(windows: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Windows in a new order every epoch, ``size`` at a time."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(windows, generator=generator)
        for start in range(0, windows, size):
            yield order[start : start + size].tolist()


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the full learning rate: a linear rise over the first ``warmup`` of all steps, then half a cosine."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))
