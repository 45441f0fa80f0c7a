"""What a selector learns from text, and the file that keeps it beside the model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.walker import Block, WalkOptions, walk_blocks
from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.protocols import NEURON_SELECTORS
from compressllm.core.registry import Spec, build, split_spec
from compressllm.core.run import Run
from compressllm.models.weights import LiveWeights

_VERSION = "1"
_BATCH_TOKENS = 512  # small batches: a selector may run a block's first one over and over


def calibrate(model: PreTrainedModel, selector: Spec, windows: Tensor, run: Run | None = None) -> dict[str, Tensor]:
    """What the selector keeps of the windows; empty if it looks at no text.

    Args:
        model: Dense, its weights in memory; left as it is.
        windows: (n, seqlen) token ids.

    Raises: CalibrationError, UnsupportedModelError.
    """
    run = run or Run()
    depth = int(model.config.get_text_config().num_hidden_layers)
    options = WalkOptions(device=model.device, batch_tokens=_BATCH_TOKENS)

    def blocks() -> Iterator[Block]:
        return run.track(walk_blocks(model, windows, LiveWeights(model), options), depth, "calibrating")

    with torch.inference_mode():
        return build(NEURON_SELECTORS, selector).fit(blocks)


def calibration_path(folder: Path, selector: Spec) -> Path:
    """The file of a selector's calibration beside a model."""
    return folder / f"contextual-{split_spec(selector, 'neuron selector')[0]}.safetensors"


def save_calibration(path: Path, selector: Spec, fitted: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a calibration in one step.

    Args:
        facts: Where it comes from, as plain data.
    """
    about = {
        "format": "compressllm-contextual",
        "version": _VERSION,
        "selector": json.dumps(_described(selector)),
        "calibration": json.dumps(facts),
    }
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_bytes(save({name: value.contiguous().cpu() for name, value in fitted.items()}, metadata=about))
    os.replace(scratch, path)


def load_calibration(path: Path, selector: Spec) -> dict[str, Tensor]:
    """What `save_calibration` wrote.

    Raises: FormatError if it is no such file; RecipeError if it is of another selector, or one with other options.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != "compressllm-contextual" or about.get("version") != _VERSION:
                raise FormatError(f"{path}: is not a calibration of version {_VERSION}; make it anew")
            fitted = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: cannot be read as a calibration: {str(error).splitlines()[0]}") from None
    held, wanted = json.loads(about["selector"]), _described(selector)
    if held != wanted:
        raise RecipeError(f"{path}: was calibrated for {held}, not {wanted}; calibrate it anew")
    return fitted


def find_calibration(folder: Path | None, selector: Spec) -> dict[str, Tensor]:
    """The calibration beside a model, or nothing if there is none."""
    path = calibration_path(folder, selector) if folder is not None else None
    return load_calibration(path, selector) if path is not None and path.exists() else {}


def _described(selector: Spec) -> dict[str, Any]:
    """The selector with all its options."""
    name, _ = split_spec(selector, "neuron selector")
    made: Any = build(NEURON_SELECTORS, selector)
    return {name: {one.name: getattr(made, one.name) for one in dataclasses.fields(made) if one.init}}
