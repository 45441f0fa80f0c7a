"""Which linears of a student are held sparse, to which pattern, and under which masks training begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor

from compressllm.core.detect import find_sparsity, pattern_of
from compressllm.core.errors import FormatError, PatternError, RecipeError
from compressllm.core.gathered import in_order_of
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import SparsityPattern, Unstructured
from compressllm.core.run import Run
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle
from compressllm.models.linears import PrunableLinear
from compressllm.models.tensornames import tensor_names
from compressllm.recover.config import RecoverConfig


@dataclass(frozen=True)
class Held:
    """What training has to hold.

    Args:
        linears: Name -> linear, of those that are sparse, front to back.
        patterns: Name -> pattern.
        masks: Name -> keep mask at the start.
        origin: Where the masks are from: the student's own, its zeros, or the size of a dense student's weights; none
            if a dense model is trained as it is.
    """

    linears: Mapping[str, PrunableLinear]
    patterns: Mapping[str, SparsityPattern]
    masks: MaskStore
    origin: Literal["masks", "zeros", "magnitude", "none"]


def find_held(bundle: Bundle, config: RecoverConfig, run: Run) -> Held:
    """The masks of a pruned student, else its zeros, else of a dense one the largest weights.

    Raises: FormatError if a weight is not zero where its mask says pruned, or nothing is sparse and masks are to
        stay; PatternError if the student breaks ``pattern``; RecipeError if a dense student comes without one.
    """
    if missing := bundle.patterns.keys() - bundle.masks.keys():
        raise FormatError(f"{_where(bundle)}says that {min(missing)} is sparse, but holds no mask of it")
    if config.masking == "none":
        if bundle.masks or _from_zeros(bundle):
            raise RecipeError(f"masking none: {_where(bundle)}is pruned, and would be filled again; take masking fixed")
        return Held({}, {}, MaskStore(), "none")
    if bundle.masks:
        held = _own(bundle)
    elif found := _from_zeros(bundle):
        run.warn(
            f"{_where(bundle)}has no masks; holds the {len(found.linears)} linears sparse that are so by their zeros"
        )
        held = found
    else:
        held = _by_size(bundle, config)
    if config.skip and held.origin != "magnitude":
        raise RecipeError("skip: is for a dense student; what a pruned one holds dense stays dense anyway")
    if config.pattern is not None and held.origin != "magnitude":
        _check_asked(held, config.pattern, bundle)
    return held


def _own(bundle: Bundle) -> Held:
    linears = {name: linear for name, linear in all_linears(bundle.model).items() if name in bundle.masks}
    if lost := bundle.masks.keys() - linears.keys():
        raise FormatError(f"{_where(bundle)}has a mask of {min(lost)}, which is no prunable linear of the model")
    patterns: dict[str, SparsityPattern] = {}
    for name, weight in weights_of(bundle, linears):
        keep = bundle.masks[name]
        if outside := int(weight[~keep].count_nonzero()):
            raise FormatError(
                f"{_where(bundle)}{outside} weights of {name} are not zero where its mask says pruned; "
                "give the masks that the model was pruned with, or prune it again"
            )
        pattern = bundle.patterns.get(name)
        if pattern is None:  # masks that another program wrote
            pattern = pattern_of(keep)
        elif broken := pattern.violations(keep):
            raise FormatError(f"{_where(bundle)}the mask of {name} breaks {pattern} in {broken} places; prune it again")
        patterns[name] = pattern
    return Held(linears, patterns, bundle.masks, "masks")


def _from_zeros(bundle: Bundle) -> Held | None:
    linears, patterns, masks = all_linears(bundle.model), {}, MaskStore()
    for name, weight in weights_of(bundle, linears):
        if (found := find_sparsity(weight)) is not None:
            patterns[name], masks[name] = found
    return Held({name: linears[name] for name in patterns}, patterns, masks, "zeros") if patterns else None


def _by_size(bundle: Bundle, config: RecoverConfig) -> Held:
    if config.masking == "fixed":
        raise FormatError(
            f"{_where(bundle)}is dense: it has no masks and no zeros to hold; prune it first, "
            "or let masks move with masking ast and a pattern"
        )
    if config.pattern is None:
        raise RecipeError(f"pattern: {_where(bundle)}is dense; give the pattern it is to be trained to, as 2:4")
    linears = all_linears(bundle.model)
    for glob in config.skip:
        if not any(fnmatchcase(name, glob) for name in linears):
            raise RecipeError(f"skip: {glob!r} matches no linear; names look like {next(iter(linears))}")
    linears = {
        name: linear for name, linear in linears.items() if not any(fnmatchcase(name, glob) for glob in config.skip)
    }
    pattern = config.pattern.within("layer") if isinstance(config.pattern, Unstructured) else config.pattern
    masks = MaskStore()
    for name, weight in weights_of(bundle, linears):
        if reason := pattern.refuses(weight.shape):
            raise PatternError(f"{name}: {reason}; name it under skip to leave it dense")
        masks[name] = pattern.keep(weight.float().abs())
    return Held(linears, dict.fromkeys(linears, pattern), masks, "magnitude")


def _check_asked(held: Held, asked: SparsityPattern, bundle: Bundle) -> None:
    for name in held.linears:
        keep = held.masks[name]
        against = in_order_of(asked, held.patterns[name])
        reason = against.refuses(tuple(keep.shape))
        if reason is None and (broken := against.violations(keep)):
            reason = f"its mask breaks {asked} in {broken} places"
        if reason:
            raise PatternError(f"{_where(bundle)}{name}: {reason}; give the pattern it was pruned to, or none")


def weights_of(bundle: Bundle, linears: Mapping[str, PrunableLinear]) -> Iterator[tuple[str, Tensor]]:
    """Each linear's (out, in) weight, one in memory at a time where they are on disk."""
    stored = tensor_names(bundle.model, bundle.checkpoint) if bundle.checkpoint else {}
    for name, linear in linears.items():
        if bundle.checkpoint is None:
            yield name, linear.weight
        else:
            yield name, linear.turned(bundle.checkpoint.read(stored[f"{name}.weight"]))


def _where(bundle: Bundle) -> str:
    return f"{bundle.checkpoint.folder}: " if bundle.checkpoint else "the student "
