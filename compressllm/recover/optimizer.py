"""AdamW on float32 weights, which the model's parameters are written from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.recover.masking import Masking

_EPSILON = 1e-8


class Optimizer:
    """AdamW whose weights are float32 whatever the parameters are, and whose update knows of masks.

    A parameter holds what the forward pass uses, so that the gradient which arrives at it is the straight-through
    gradient of the weights behind it, and no autograd function is needed. Where that is the same float32 tensor, it
    is held once.

    Args:
        parameters: Name -> the tensor that is trained, or the rows of it that this process holds. Changed in place.
        masking: Its names are among those of ``parameters``.
        betas: Adam's averages of the gradient and of its square.
        weight_decay: Decoupled, of matrices, and of these only what is kept.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], masking: Masking, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._masking, self._betas, self._weight_decay = masking, betas, weight_decay
        self.steps = 0
        moving = set(masking.weights) if masking.moves else set()
        self.weights: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            alone = parameter.dtype != torch.float32 or (name in masking.weights and masking.apart)
            self.weights[name] = parameter.to(torch.float32, copy=True) if alone else parameter
        # Scales are trained like parameters, though the model has none of that name.
        self._scaled = moving if masking.scales else set()
        for name in self._parameters:
            if name in self._scaled:
                self.weights[scale_name(name)] = column_scales(self.weights[name], masking, name)
        # Moments of all are made now, so that a checkpoint's layout is known and memory does not grow after step one.
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self._moving = [name for name in self.weights if name in moving]
        self._plain = [name for name in self.weights if name not in moving]
        apart = [n for n, weight in self.weights.items() if weight is not self._parameters.get(n, weight)]
        made = moving | (set(masking.weights) if masking.apart else set())  # from the weight by the masking
        self._apart = [name for name in apart if name in made], [name for name in apart if name not in made]
        self._adamw = self._ordinary_adamw()
        masking.begin_(self.weights)
        self.write_()

    def _ordinary_adamw(self) -> torch.optim.AdamW:
        """Torch's own, in one pass over memory, of the weights that no moving mask is on; its moments are ours."""
        decays = {name: name in self._parameters and self.weights[name].dim() > 1 for name in self._plain}
        matrices = [self.weights[name] for name in self._plain if decays[name]]
        vectors = [self.weights[name] for name in self._plain if not decays[name]]
        groups = [{"params": matrices, "weight_decay": self._weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        used = [group for group in groups if group["params"]] or [{"params": [torch.empty(0)]}]
        adamw = torch.optim.AdamW(used, betas=self._betas, eps=_EPSILON, fused=True)
        for name in self._plain:
            weight = self.weights[name]
            step = torch.zeros((), device=weight.device)
            adamw.state[weight] = {"step": step, "exp_avg": self.first[name], "exp_avg_sq": self.second[name]}
        return adamw

    def step_(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One update from float32 gradients, which masking has cleaned; writes the parameters."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self._scaled:
            gradients = self._by_weight_and_scale(gradients)
        for name in self._plain:
            self.weights[name].grad = gradients[name]
        self._adamw.step()
        self._adamw.zero_grad()
        for name in self._moving:
            self._moving_adamw_(name, gradients[name], lr)
        self.steps += 1
        self.write_()

    def resume_(self, steps: int) -> None:
        """Go on after so many steps, whose weights and moments have been put into place. Writes the parameters."""
        self.steps = steps
        for state in self._adamw.state.values():
            state["step"].fill_(float(steps))
        self.write_()

    def write_(self) -> None:
        """Write the parameters from the weights behind them, where these are not the same tensor."""
        made, plain = self._apart
        for name in made:
            self._parameters[name].copy_(self._masking.forward_weight(name, self.effective(name), self.steps))
        if plain:
            torch._foreach_copy_([self._parameters[name] for name in plain], [self.weights[name] for name in plain])

    def result(self, name: str) -> Tensor:
        """The float32 weight as it is to be used once training is over, 0.0 wherever it is pruned.

        Its scales are multiplied in, and those are 1 from then on.
        """
        if name not in self._parameters:
            return torch.ones_like(self.weights[name])
        masked = self._masking.weights.get(name)
        return self.weights[name] if masked is None else self.effective(name).masked_fill(~masked.keep, 0.0)

    def effective(self, name: str) -> Tensor:
        """The float32 weight with its scales multiplied in; the optimizer's own if it has none."""
        return self.weights[name] * self._scale_of(name) if name in self._scaled else self.weights[name]

    def shapes(self, whole: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Of all that is trained, scales included, from the whole shapes of the parameters."""
        scaled = {
            scale_name(name): _scale_shape(whole[name], self._masking.scales, self._masking.weights[name].transposed)
            for name in whole
            if name in self._scaled
        }
        return {**whole, **scaled}

    @contextmanager
    def as_result(self) -> Iterator[None]:
        """The parameters are what they are to be once training is over, for as long as the context lasts."""
        if self._masking.exact:
            yield
            return
        kept = {name: self._parameters[name].clone() for name in self._masking.weights}
        try:
            for name in kept:
                self._parameters[name].copy_(self.result(name))
            yield
        finally:
            for name, value in kept.items():
                self._parameters[name].copy_(value)

    def _moving_adamw_(self, name: str, gradient: Tensor, lr: float) -> None:
        """The update of a weight under a mask that moves; one tensor at a time, so that it stays in the caches."""
        (beta1, beta2), weight = self._betas, self.weights[name]
        momentum, square = self.first[name], self.second[name]
        done = self.steps + 1
        momentum.lerp_(gradient, 1 - beta1)
        # AST and CAST square the momentum before they correct its bias, so that a first step is ten times the learning
        # rate, which their warm-up of hundreds of steps hides; corrected first, it is one.
        direction = self._masking.direction(name, momentum / (1 - beta1**done), weight, self.steps)
        square.mul_(beta2).addcmul_(direction, direction, value=1 - beta2)
        if self._weight_decay:
            weight.sub_(weight * self._masking.weights[name].keep, alpha=lr * self._weight_decay)
        denominator = square.sqrt().div_(math.sqrt(1 - beta2**done)).add_(_EPSILON)
        weight.addcdiv_(direction, denominator, value=-lr)

    def _scale_of(self, name: str) -> Tensor:
        """The scale of each weight, of the parameter's shape."""
        scale, along = self.weights[scale_name(name)], 0 if self._masking.weights[name].transposed else 1
        return scale.repeat_interleave(self.weights[name].shape[along] // self._masking.scales, dim=along)

    def _by_weight_and_scale(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From gradients by W A, as parameters hold it, those by W and by A: each is the other's factor."""
        found = dict(gradients)
        for name in self._scaled:
            gradient, weight, parts = gradients[name], self.weights[name], self._masking.scales
            by_scale = gradient * weight
            if self._masking.weights[name].transposed:
                found[scale_name(name)] = by_scale.reshape(parts, len(weight) // parts, weight.shape[1]).sum(1)
            else:
                found[scale_name(name)] = by_scale.reshape(len(weight), parts, weight.shape[1] // parts).sum(2)
            found[name] = gradient * self._scale_of(name)
        return found


def scale_name(name: str) -> str:
    """What the scales of a parameter are kept under."""
    return f"{name}.scale"


def column_scales(weight: Tensor, masking: Masking, name: str) -> Tensor:
    """Scales of 1 for equal parts of each row of a weight, (out, parts), or its transpose's (parts, out).

    Raises: RecipeError if its inputs cannot be divided so.
    """
    transposed = masking.weights[name].transposed
    if (inputs := weight.shape[0 if transposed else 1]) % masking.scales:
        raise RecipeError(
            f"{name}: {inputs} inputs cannot be divided into {masking.scales} scaled parts; set scales: 0"
        )
    shape = _scale_shape(weight.shape, masking.scales, transposed)
    return torch.ones(shape, dtype=torch.float32, device=weight.device)


def _scale_shape(weight: torch.Size, parts: int, transposed: bool) -> torch.Size:
    return torch.Size((parts, weight[1]) if transposed else (weight[0], parts))
