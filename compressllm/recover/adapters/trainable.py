"""What of a model is trained: counted, saved and loaded by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressllm.core.errors import FormatError
from compressllm.models.tensorfile import TensorFile, TensorFileWriter, TensorSpec


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_facts(model: nn.Module) -> dict[str, Any]:
    """How many parameters are trained, of how many with the adapter's own, for the manifest."""
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"trainable": trained, "parameters": total, "trainable_share": trained / total}


def save_trainable(model: nn.Module, path: Path) -> None:
    """Write the trained parameters to a safetensors file; one of the same layout is written over."""
    parameters = trainable(model)
    writer = TensorFileWriter(path, {name: TensorSpec(p.dtype, tuple(p.shape)) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        writer.write(name, parameter)
    writer.close()


@torch.no_grad()
def load_trainable_(model: nn.Module, path: Path) -> None:
    """Read them back. Changes the model in place.

    Raises: FormatError, with nothing changed, if the file holds other parameters or others shapes than are trained.
    """
    file, parameters = TensorFile(path), trainable(model)
    if differing := file.specs.keys() ^ parameters.keys():
        where = "the file" if min(differing) in file.specs else "the model"
        raise FormatError(f"{path}: {min(differing)} is in {where} only; attach the adapter it was saved from")
    for name, parameter in parameters.items():
        if file.specs[name].shape != tuple(parameter.shape):
            raise FormatError(
                f"{path}: {name} has shape {file.specs[name].shape}, the model's {tuple(parameter.shape)}; "
                "attach the adapter it was saved from"
            )
    for name, parameter in parameters.items():
        parameter.copy_(file.read(name))
