"""Masks of linears as masks of the parameters that are trained, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch

from compressllm.core.errors import PatternError, RecipeError, UnsupportedModelError
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.scheme import parse_scheme
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle
from compressllm.models.tensornames import tensor_names
from compressllm.recover.config import RecoverConfig
from compressllm.recover.deferred import Deferred
from compressllm.recover.held import Held
from compressllm.recover.masking import Adaptive, MaskedWeight, Masking
from compressllm.recover.rounded import Rounded
from compressllm.recover.schedules import annealed_decay, gradual_sparsity, mask_decay, structure_decay
from compressllm.recover.sharding import Sharding
from compressllm.recover.tightening import Gradual, MaskDecay, StructureDecay

#: What an exponential mask decay has fallen to by the time that masks are frozen, unless its rate is given.
_LEFT: Final = 0.01


def make_masking(
    bundle: Bundle, held: Held, shapes: Mapping[str, torch.Size], config: RecoverConfig, sharding: Sharding
) -> Masking:
    """The masking that settings name, of those held weights that are trained.

    Args:
        shapes: Trained parameter -> whole shape.

    Raises: UnsupportedModelError, RecipeError if masks are to move that cannot.
    """
    weights = _masked_weights(held, shapes, sharding)
    if config.quantize is not None:
        weights, stored = _to_round(bundle, weights, shapes, sharding)
        return Rounded(weights, parse_scheme(config.quantize), stored)
    if config.masking in ("fixed", "none"):
        return Masking(weights)
    for name, linear in held.linears.items():
        if linear.parameter not in shapes:
            raise RecipeError(f"frozen: {name} is under a mask that moves; leave it to train, or take masking fixed")
        pattern = held.patterns[name]
        whole_layer = isinstance(pattern, Unstructured) and pattern.group != "row"
        if linear.expert is not None or (sharding.name != "replicated" and (linear.form or whole_layer)):
            reason = linear.form or f"{pattern}, which is chosen over rows that other processes hold"
            raise UnsupportedModelError(f"{name}: {reason}; its mask cannot move here, use masking fixed")
    last = config.steps - round(config.freeze * config.steps)
    if config.masking == "deferred":
        return Deferred(weights, config.strength, config.steps, config.refresh, last, config.scales)
    if config.masking != "ast":
        return _tightening(weights, held, config, last)
    return Adaptive(weights, decay_of(config), config.refresh, last, config.decay == "reversed")


def _tightening(weights: dict[str, MaskedWeight], held: Held, config: RecoverConfig, last: int) -> Masking:
    """Masks that begin dense. Raises RecipeError, PatternError if they cannot."""
    if held.origin != "magnitude":
        raise RecipeError(
            f"masking {config.masking}: begins with a dense model and a pattern, and the student is pruned already; "
            "give the dense one, or take masking fixed or ast"
        )
    if config.masking == "gradual":
        prunings = max(1, last // config.refresh)

        def share(step: int) -> float:
            return gradual_sparsity(step, 0, config.refresh, prunings, 0.0, 1.0)

        return Gradual(weights, share, config.refresh, last)
    if config.masking == "mask-decay":
        rate = config.decay_strength if config.decay_strength is not None else -math.log(_LEFT) / max(1, last)

        def factor(step: int) -> float:
            return mask_decay(step, config.steps, rate, shape=config.decay_shape, hard=config.freeze)

        return MaskDecay(weights, factor, config.refresh, last)

    def pattern(target: NM, step: int) -> NM:
        return NM(*structure_decay(step, config.steps, target.n, target.m, kind=config.structure))

    for name, linear in held.linears.items():
        target = held.patterns[name]
        if not isinstance(target, NM):
            raise PatternError(f"masking structure-decay: {target} has no groups; give a pattern as 2:4")
        widest = pattern(target, 0)
        if reason := widest.refuses(linear.shape):
            raise PatternError(f"{name}: {reason}; take structure: stepwise, or name it under skip")
    return StructureDecay(weights, pattern, config.refresh, last)


def decay_of(config: RecoverConfig) -> Callable[[int], float]:
    """Step, from 0 -> strength of the decay of pruned weights under ast."""
    if config.decay == "none":
        return lambda step: 0.0
    ramp = 0 if config.decay == "static" else round(config.ramp * config.steps)
    return lambda step: annealed_decay(step, ramp, config.strength)


def final_masks(held: Held, masking: Masking, shapes: Mapping[str, torch.Size], sharding: Sharding) -> MaskStore:
    """The masks that training ended with, on every process."""
    if not masking.moves:
        return held.masks
    masks = MaskStore()
    for name, linear in held.linears.items():
        one = masking.weights[linear.parameter]
        whole = sharding.whole(one.keep, shapes[linear.parameter]).cpu()
        masks[name] = (whole.T if one.transposed else whole).contiguous()
    return masks


def _to_round(
    bundle: Bundle, weights: dict[str, MaskedWeight], shapes: Mapping[str, torch.Size], sharding: Sharding
) -> tuple[dict[str, MaskedWeight], dict[str, torch.dtype]]:
    """Every prunable weight, one that no mask is of with a mask that keeps all; and the dtypes they are stored in."""
    stored = tensor_names(bundle.model, bundle.checkpoint) if bundle.checkpoint else {}
    dtypes: dict[str, torch.dtype] = {}
    for name, linear in all_linears(bundle.model).items():
        if linear.parameter not in shapes:  # frozen: what is not trained stays as it is
            continue
        specs = bundle.checkpoint.specs if bundle.checkpoint else {}
        dtypes[linear.parameter] = specs[stored[f"{name}.weight"]].dtype if specs else linear.weight.dtype
        if linear.parameter not in weights:
            every = torch.ones(shapes[linear.parameter], dtype=torch.bool, device=sharding.device)
            weights[linear.parameter] = MaskedWeight(every, Unstructured(0.0), linear.transposed)
    return weights, dtypes


def _masked_weights(held: Held, shapes: Mapping[str, torch.Size], sharding: Sharding) -> dict[str, MaskedWeight]:
    weights: dict[str, MaskedWeight] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, linear in held.linears.items():
        if linear.parameter not in shapes:
            continue
        keep = linear.turned(held.masks[name])
        if linear.expert is not None:  # one of many in a parameter; what no mask is of is kept
            of_all = whole.setdefault(linear.parameter, torch.ones(shapes[linear.parameter], dtype=torch.bool))
            of_all[linear.expert, linear.rows[0] : linear.rows[1]] = keep
            keep = of_all
        weights[linear.parameter] = MaskedWeight(keep, held.patterns[name], linear.transposed)
    for one in weights.values():
        one.keep = sharding.rows(one.keep).contiguous().to(sharding.device)
    return weights
