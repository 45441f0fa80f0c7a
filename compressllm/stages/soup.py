"""Average recovered models into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compressllm.calibration.config import CalibrationConfig
from compressllm.calibration.windows import Windows, windows_for
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import RecipeError
from compressllm.core.run import Run
from compressllm.eval.perplexity import perplexity
from compressllm.export.writer import export_model
from compressllm.models.bundle import bundle_of, open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import Facts
from compressllm.models.loading import load_model
from compressllm.models.resolve import resolve_model
from compressllm.recover.soup import Soup, choose_greedily
from compressllm.stages.soupconfig import SoupConfig


def make_soup(members: Sequence[str], out: Path, config: SoupConfig | None = None, run: Run | None = None) -> Facts:
    """Write the average of pruned models with the same masks to a new folder; it is exactly as sparse as they are.

    A few tensors of each are in memory at a time; greedy also loads one model at a time to measure it. The folder
    appears whole or not at all, read back and compared, and its ``compressllm.json`` says what is in the soup.

    Args:
        members: At least two, each anything `resolve_model` takes.

    Raises: RecipeError, CalibrationError; FormatError if they do not fit together or ``out`` holds something.
    """
    config, run = config or SoupConfig(), run or Run()
    if len(members) < 2:
        raise RecipeError(f"got {len(members)} model to average; at least 2 are needed")
    folders = [resolve_model(member) for member in members]
    notes: dict[str, Any] = {"method": config.method}
    if config.method == "greedy":
        windows = _held_out(folders[0], config, run)
        chosen = choose_greedily(folders, _loss_on(windows.ids, config, run))
        folders = chosen.members
        notes |= {"alone": chosen.alone, "tried": chosen.tried, "loss": chosen.loss, "held_out": windows.facts()}
    elif config.source is not None:
        raise RecipeError("soup: only method greedy looks at text; leave the source out, or say greedy")
    return export_model(Soup(folders, notes), out, config.format, run.show)


def _held_out(folder: Path, config: SoupConfig, run: Run) -> Windows:
    if config.source is None:
        raise RecipeError("soup: method greedy needs held-out text to choose on; name a source, not the test set")
    text = CalibrationConfig(source=config.source, samples=config.windows, seqlen=config.seqlen)
    return windows_for(open_bundle(str(folder)), text, run)


def _loss_on(ids: Tensor, config: SoupConfig, run: Run) -> Callable[[Checkpoint], float]:
    device = choose_device(config.device)

    def loss(checkpoint: Checkpoint) -> float:
        dtype = choose_dtype(config.dtype, bundle_of(checkpoint).stored_dtype, device)
        return perplexity(load_model(checkpoint, dtype, device), ids, progress=run.track).nll

    return loss
