"""Which pattern each linear gets."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from compressllm.core.errors import PatternError, RecipeError
from compressllm.core.pattern import Group, SparsityPattern, Unstructured
from compressllm.models.blocks import all_linears


def make_plan(
    model: PreTrainedModel, pattern: SparsityPattern, skip: Sequence[str], group: Group
) -> dict[str, SparsityPattern]:
    """Linear name -> pattern, front to back; skipped linears are absent.

    Args:
        skip: Globs of linear names to leave dense.
        group: Where scores compete if an unstructured pattern does not say.

    Raises: PatternError naming the first linear that cannot take the pattern; RecipeError for a glob that
        matches nothing, or if nothing is left to prune.
    """
    linears = all_linears(model)
    for glob in skip:
        if not any(fnmatchcase(name, glob) for name in linears):
            example = next(iter(linears))
            raise RecipeError(f"skip: {glob!r} matches no linear; names look like {example}")
    if isinstance(pattern, Unstructured):
        pattern = pattern.within(group)
    plan: dict[str, SparsityPattern] = {}
    for name, linear in linears.items():
        if any(fnmatchcase(name, glob) for glob in skip):
            continue
        if reason := pattern.refuses(linear.shape):
            raise PatternError(f"{name}: {reason}; name it under skip to leave it dense")
        plan[name] = pattern
    if not plan:
        raise RecipeError("skip: leaves no linear to prune")
    return plan
