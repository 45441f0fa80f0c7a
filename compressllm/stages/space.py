"""Whether what a run will write fits on the disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from compressllm.core.errors import RunError
from compressllm.core.scheme import parse_scheme
from compressllm.export.config import ExportConfig
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle
from compressllm.prune.config import PermuteConfig, PruneConfig
from compressllm.quantize.config import QuantizeConfig
from compressllm.recover.config import RecoverConfig
from compressllm.stages.recipe import Recipe
from compressllm.stages.recoverconfig import RecoverStageConfig


@dataclass(frozen=True)
class Needed:
    """Bytes that a stage needs.

    Args:
        left: Of the model it leaves.
        peak: At most, while it runs; at least ``left``.
    """

    stage: str
    left: int
    peak: int


def needed_space(recipe: Recipe, bundle: Bundle) -> list[Needed]:
    """What each stage of a recipe writes: weights, masks and checkpoints; what is smaller is left out."""
    specs = bundle.checkpoint.specs if bundle.checkpoint else {}
    plain = sum(spec.bytes for spec in specs.values())
    numbers = sum(math.prod(spec.shape) for spec in specs.values())
    pruned = sum(math.prod(linear.shape) for linear in all_linears(bundle.model).values())
    width = bundle.stored_dtype.itemsize
    removed = [pattern.sparsity for pattern in bundle.patterns.values()]
    kept = 1 - sum(removed) / len(removed) if removed else 1.0
    needed = []
    for name, config in recipe.steps():
        left = peak = 0
        if isinstance(config, PruneConfig):
            kept = 1 - config.pattern.sparsity
        if isinstance(config, PruneConfig | PermuteConfig | RecoverConfig | ExportConfig):
            left = peak = plain + (pruned // 8 if kept < 1 else 0)
        if isinstance(config, ExportConfig) and config.format == "packed":
            left = peak = plain - pruned * width + int(pruned * kept) * width + pruned // 8
        if isinstance(config, QuantizeConfig):
            left = peak = plain - pruned * width + int(pruned * kept) * parse_scheme(config.scheme).bits // 8
        if isinstance(config, RecoverConfig) and config.train == "all" and config.save_every < 1:
            # A checkpoint is the weights and two moments in float32, and goes when the next one is there; beside it lie
            # the best weights.
            peak = max(28 * numbers, 16 * numbers + left)
        if isinstance(config, RecoverStageConfig) and config.teacher_tokens:
            peak += plain  # it lies there while the student is trained
        needed.append(Needed(name, left, peak))
    return needed


def total_space(needed: list[Needed]) -> int:
    """Bytes of the disk that a run takes at most: the models of all stages stay."""
    most = before = 0
    for one in needed:
        most = max(most, before + one.peak)
        before += one.left
    return most


def check_space(needed: list[Needed], out: Path, begun: Path) -> None:
    """See that the stages that are not finished fit. Raises RunError that says what is needed and free.

    Args:
        begun: Folder of the first of them, which holds what an interrupted run has written already.
    """
    there = sum(path.stat().st_blocks * 512 for path in begun.rglob("*") if path.is_file())
    more, free = total_space(needed) - there, shutil.disk_usage(out).free
    if more > free:
        stages = ", ".join(f"{one.stage} {space_text(one.peak)}" for one in needed if one.peak)
        raise RunError(
            f"{out}: the run needs about {space_text(more)} of disk space ({stages}), {space_text(free)} are free; "
            "make room, or give a folder elsewhere"
        )


def space_text(count: int) -> str:
    """``"1.2 GB"``, or ``"3.4 MB"`` of less."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
