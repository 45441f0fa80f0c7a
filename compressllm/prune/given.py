"""Masks that a refiner is given: those of a pruned checkpoint, read one linear at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.errors import FormatError, PatternError, RecipeError
from compressllm.core.gathered import Gathered
from compressllm.core.masks import pack_bits
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS, Pruned, Pruner
from compressllm.core.stats import InputStats
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.linears import PrunableLinear
from compressllm.models.loading import skeleton
from compressllm.models.resolve import resolve_model
from compressllm.models.tensornames import tensor_names
from compressllm.prune.config import PruneConfig
from compressllm.prune.gather import solve_in_order
from compressllm.prune.plan import make_plan
from compressllm.prune.refiner import Refiner

#: A linear of a checkpoint that is silent about it counts as sparse from this fraction of zeros on: rounding alone
#: leaves some.
_SPARSE = 0.1


class GivenMasks:
    """The masks of a pruned checkpoint, for a refiner of the dense model it was made from.

    Nothing of the checkpoint stays in memory but names: a mask is read when its linear's turn comes.

    Args:
        source: Anything `resolve_model` takes.
        refiner: What starts from the masks.
        model: The dense model; its parameters may be on the meta device.
        names: Linears to refine.
        pattern: What masks have to obey if the checkpoint does not say.

    Attributes:
        plan: Linear name -> the pattern of its mask; linears that are dense in the checkpoint are absent.
        sha256: Hash of those masks and patterns.

    Raises: FormatError if ``source`` is no checkpoint of the same linears, none of them is sparse in it, or a mask
        breaks the pattern it is said to have; PatternError if one breaks ``pattern``; UnsupportedModelError.
    """

    def __init__(
        self, source: str, refiner: Refiner, model: PreTrainedModel, names: Iterable[str], pattern: SparsityPattern
    ) -> None:
        self._refiner = refiner
        self._checkpoint = Checkpoint(resolve_model(source))
        self._where = f"masks: {self._checkpoint.folder}"
        sparse = skeleton(self._checkpoint)
        self._same_linears(all_linears(sparse), all_linears(model))
        stored = tensor_names(sparse, self._checkpoint)
        self._owner = {name: stored[f"{name}.weight"].removesuffix(".weight") for name in all_linears(sparse)}
        self.plan: dict[str, SparsityPattern] = {}
        digest = hashlib.sha256()
        for name in names:
            if (keep := self._read(name)) is None:
                continue
            self.plan[name] = self._pattern(name, keep, pattern)
            digest.update(f"{name} {tuple(keep.shape)} {self.plan[name]}\n".encode())
            if isinstance(gathered := self.plan[name], Gathered):
                digest.update(gathered.order_text.encode())
            digest.update(pack_bits(keep).numpy().tobytes())
        if not self.plan:
            raise FormatError(f"{self._where}: none of the linears to refine is sparse there; give a pruned model")
        self.sha256 = digest.hexdigest()

    def refine(self, name: str, weight: Tensor, stats: InputStats) -> Pruned:
        """Refine the mask of a planned linear, whose dense weight is (out, in) float32. Does not change it."""
        pattern, keep = self.plan[name], self.keep(name).to(weight.device)
        if not isinstance(pattern, Gathered):
            return self._refiner.refine(weight, keep, stats, pattern)
        ordered = pattern.ordered(keep)
        return solve_in_order(weight, stats, pattern, lambda *seen: self._refiner.refine(seen[0], ordered, *seen[1:]))

    def keep(self, name: str) -> Tensor:
        """The (out, in) bool mask of a planned linear, on the CPU.

        A group of N:M that is short of N weights, as a zero among those that were kept leaves it, is filled up.
        """
        keep, pattern = self._read(name), self.plan[name]
        if keep is None:
            raise FormatError(f"{self._where}: the mask of {name} is gone; it must not change while it is read")
        return pattern.keep(keep.float()) if isinstance(pattern, NM | Gathered) else keep

    def _same_linears(self, there: Mapping[str, PrunableLinear], here: Mapping[str, PrunableLinear]) -> None:
        for name in [*here, *there]:
            ours, theirs = (all_[name].shape if name in all_ else None for all_ in (here, there))
            if ours != theirs:
                raise FormatError(
                    f"{self._where}: {_has(name, theirs)}, and the model {_has(name, ours)}; "
                    "give a pruned copy of the model itself"
                )

    def _pattern(self, name: str, keep: Tensor, asked: SparsityPattern) -> SparsityPattern:
        """The recorded pattern of a mask, else the one asked for; checked."""
        recorded = self._checkpoint.facts.patterns.get(self._owner[name]) if self._checkpoint.facts else None
        pattern = recorded or asked
        reason = pattern.refuses(tuple(keep.shape))
        if reason is None and (broken := pattern.violations(keep)):
            reason = f"its mask breaks {pattern} in {broken} places"
        if reason and recorded:
            raise FormatError(f"{self._where}: {name}: {reason}, though it is said to be {recorded}")
        if reason:
            raise PatternError(f"{self._where}: {name}: {reason}; give the pattern it was pruned to")
        return pattern

    def _read(self, name: str) -> Tensor | None:
        """The mask as it is stored, else where the weight is not zero; None of a dense linear."""
        owner, facts = self._owner[name], self._checkpoint.facts
        if (keep := self._checkpoint.mask(owner)) is not None:
            return keep
        recorded = facts is not None and owner in facts.patterns
        if facts is not None and not recorded:
            return None
        keep = self._checkpoint.read(f"{owner}.weight") != 0
        zeros = keep.numel() - int(keep.count_nonzero())
        return keep if recorded or zeros >= _SPARSE * keep.numel() else None


def open_given(config: PruneConfig, pruner: Pruner, bundle: Bundle) -> GivenMasks | None:
    """The masks that ``config`` names, for the linears it does not skip; None if it names none.

    Raises: RecipeError if the method is no refiner, ``skip`` leaves nothing or the bundle's own weights are gone
        already; what `GivenMasks` raises.
    """
    if config.masks is None:
        return None
    if not isinstance(pruner, Refiner):
        refiners = [name for name in PRUNERS.names() if issubclass(PRUNERS.get(name), Refiner)]
        raise RecipeError(
            f"masks: {config.method} does not start from a given mask; use a refiner: {', '.join(refiners)}"
        )
    pattern = config.pattern.within(pruner.group) if isinstance(config.pattern, Unstructured) else config.pattern
    # Any shape takes this pattern: here only names matter, and what is asked for may not be what the masks have.
    names = make_plan(bundle.model, Unstructured(0.0), config.skip, pruner.group)
    given = GivenMasks(config.masks, pruner, bundle.model, names, pattern)
    if sparse := [name for name in given.plan if name in bundle.patterns]:
        raise RecipeError(f"masks: {sparse[0]} of the model is sparse already; give the dense model it was made from")
    return given


def _has(name: str, shape: tuple[int, ...] | None) -> str:
    return f"has {name} of shape {shape}" if shape else f"has no {name}"
