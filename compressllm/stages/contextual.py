"""The contextual stage: calibrate a neuron selector, keep that beside the model, and measure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.windows import evaluation_windows, windows_for
from compressllm.contextual.attach import Contextual
from compressllm.contextual.calibrate import (
    calibrate,
    calibration_path,
    find_calibration,
    load_calibration,
    save_calibration,
)
from compressllm.contextual.config import ContextualConfig
from compressllm.contextual.evaluate import Trial, measure_dense, measure_density, tradeoff
from compressllm.contextual.probes import make_items
from compressllm.contextual.streaming import Stream
from compressllm.core.atomic import put_in_place
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import FormatError
from compressllm.core.protocols import CORRECTORS, NEURON_SELECTORS
from compressllm.core.registry import Spec, build
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.seal import seal
from compressllm.models.sidefiles import inside
from compressllm.stages.evaluate import prepare


def contextual_stage(bundle: Bundle, config: ContextualConfig, run: Run) -> Bundle:
    """Calibrate and measure; the model itself stays as it is, with the calibration beside it.

    Raises: FormatError if the bundle is not a checkpoint; CalibrationError, UnsupportedModelError, RecipeError.
    """
    if bundle.checkpoint is None or run.folder is None:
        raise FormatError("the contextual stage keeps its calibration beside a checkpoint: save the model first")
    fitted, facts = _fit(bundle, config, run)
    run.metrics.update(measure_contextual(bundle, config, fitted, run))
    run.metrics["calibration"] = facts
    folder = _beside(bundle.checkpoint.folder, run.folder / "model.partial")
    if fitted:
        save_calibration(calibration_path(folder, config.selector), config.selector, fitted, facts or {})
        if bundle.checkpoint.facts:
            seal(folder, bundle.checkpoint.facts.sha256)
    put_in_place(folder, run.folder / "model")
    return open_bundle(str(run.folder / "model"))


def measure_contextual(bundle: Bundle, config: ContextualConfig, fitted: dict[str, Tensor], run: Run) -> dict[str, Any]:
    """Quality, effort and speed at every density asked for; ``tradeoff`` are the rows of the curve."""
    windows = evaluation_windows(
        config.source,
        bundle.tokenizer,
        seqlen=config.seqlen,
        limit=config.windows,
        max_seqlen=bundle.max_seqlen,
        vocab_size=bundle.vocab_size,
    )
    model = prepared(bundle, config)
    items = make_items(config.probes, run.seed) if config.probes and bundle.tokenizer else []
    trial = Trial(windows.ids, config.prompt_tokens, config.new_tokens, items)
    corrector = build(CORRECTORS, config.correct) if config.correct is not None else None
    reference, points = None, []
    for density in dict.fromkeys((config.density, *config.curve)):
        contextual = Contextual(model, config.selector, density, fitted, config.skip_first, config.skip_last)
        try:
            if reference is None:
                reference = measure_dense(contextual, bundle.tokenizer, trial)
            points.append(measure_density(contextual, bundle.tokenizer, trial, reference, corrector, run))
        finally:
            contextual.detach_()
    assert reference is not None
    return {
        "source": windows.source,
        "ids_sha256": windows.sha256,
        "rule": f"{windows.rule}; the first {config.prompt_tokens} tokens of each are its prompt; greedy",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "dense": reference.facts(),
        "points": points,
        "tradeoff": tradeoff(reference, points),
    }


def prepared(bundle: Bundle, config: ContextualConfig) -> PreTrainedModel:
    """The model in memory, its sparse linears on the backend asked for."""
    model, _ = prepare(bundle, EvalConfig(dtype=config.dtype, device=config.device, backend=config.backend))
    return model


def plan_contextual(bundle: Bundle, config: ContextualConfig) -> str:
    """One line on what the stage would do."""
    densities = ", ".join(f"{density:g}" for density in dict.fromkeys((config.density, *config.curve)))
    return f"{config.selector} at density {densities}, corrected by {config.correct or 'nothing'}"


def _fit(bundle: Bundle, config: ContextualConfig, run: Run) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    if not build(NEURON_SELECTORS, config.selector).calibrated:
        return {}, None
    windows = windows_for(bundle, config.calibration, run)
    device = choose_device(config.device)
    model = bundle.live(choose_dtype(config.dtype, bundle.stored_dtype, device), device)
    return calibrate(model, config.selector, windows.ids, run), windows.facts()


def _beside(source: Path, folder: Path) -> Path:
    """A folder with the files of another: weights linked where the file system can, since nobody changes them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file():
            real = inside(source, path.name)
            if not (path.suffix == ".safetensors" and _linked(real, folder / path.name)):
                shutil.copy2(real, folder / path.name)
    return folder


def _linked(path: Path, to: Path) -> bool:
    try:
        os.link(path.resolve(), to)
    except OSError:
        return False
    return True


def open_stream(
    bundle: Bundle, config: EvalConfig, selector: Spec, density: float, correct: Spec | None, calibration: Path | None
) -> Stream:
    """A bundle's model ready to continue prompts by few neurons.

    Args:
        calibration: The selector's, if not the one beside the model.

    Raises: FormatError, RecipeError, UnsupportedModelError, BackendUnavailableError.
    """
    if bundle.tokenizer is None:
        raise FormatError("the model folder holds no tokenizer, so no text can be generated")
    corrector = build(CORRECTORS, correct) if correct is not None else None
    build(NEURON_SELECTORS, selector)  # finds a wrong name before the model is read
    if calibration is not None:
        fitted = load_calibration(calibration, selector)
    else:
        fitted = find_calibration(bundle.checkpoint.folder if bundle.checkpoint else None, selector)
    model, _ = prepare(bundle, config)
    return Stream(Contextual(model, selector, density, fitted), bundle.tokenizer, corrector)
