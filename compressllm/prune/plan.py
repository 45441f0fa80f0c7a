"""Which pattern each linear gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from transformers import PreTrainedModel

from compressllm.core.errors import PatternError, RecipeError
from compressllm.core.pattern import Group, SparsityPattern, Unstructured
from compressllm.models.blocks import all_linears


def make_plan(
    model: PreTrainedModel,
    pattern: SparsityPattern,
    skip: Sequence[str],
    group: Group,
    patterns: Mapping[str, SparsityPattern | Literal["dense"]] | None = None,
) -> dict[str, SparsityPattern]:
    """Linear name -> pattern as it was asked for, front to back; linears left dense are absent.

    Args:
        pattern: For linears that no glob in ``patterns`` matches.
        skip: Globs of linear names to leave dense.
        group: Where scores compete if an unstructured pattern does not say.
        patterns: Glob -> pattern or ``dense``; the first that matches a linear holds.

    Raises: PatternError naming the first linear that cannot take the pattern; RecipeError for a glob that
        matches nothing, or if nothing is left to prune.
    """
    linears, patterns = all_linears(model), patterns or {}
    for field, globs in (("skip", skip), ("patterns", patterns)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in linears):
                example = next(iter(linears))
                raise RecipeError(f"{field}: {glob!r} matches no linear; names look like {example}")
    plan: dict[str, SparsityPattern] = {}
    for name, linear in linears.items():
        own = first_match(name, patterns)
        chosen = pattern if own is None else patterns[own]
        if chosen == "dense" or first_match(name, skip) is not None:
            continue
        if isinstance(chosen, Unstructured):
            chosen = chosen.within(group)
        if reason := chosen.refuses(linear.shape):
            raise PatternError(f"{name}: {reason}; name it under skip to leave it dense")
        plan[name] = chosen
    if not plan:
        raise RecipeError(f"{'skip and patterns leave' if patterns else 'skip: leaves'} no linear to prune")
    return plan


def first_match(name: str, globs: Iterable[str]) -> str | None:
    """The first glob that matches a linear's name."""
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)
