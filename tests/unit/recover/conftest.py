"""Models recovered from one pruned model, as checkpoint folders."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import MASKS_NAME, write_masks
from compressllm.models.facts import Facts, LinearFacts
from compressllm.models.shards import file_sha256

Member = Callable[..., Path]


@pytest.fixture
def member(tmp_path: Path) -> Member:
    """``member("a", model, seed)``: the model at 2:4 by magnitude, what is kept then moved at random; with masks."""

    def make(name: str, model: PreTrainedModel, seed: int, moved: float = 0.05) -> Path:
        torch.manual_seed(seed)
        moved_model, masks = copy.deepcopy(model), MaskStore()
        for path, linear in all_linears(moved_model).items():
            masks[path] = NM(2, 4).keep(linear.weight.abs())
            linear.weight.mul_(1 + moved * torch.randn_like(linear.weight)).masked_fill_(~masks[path], 0.0)
        for parameter in moved_model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(moved * torch.randn_like(parameter))
        moved_model.save_pretrained(tmp_path / name)
        write_masks(tmp_path / name / MASKS_NAME, masks)
        linears = {
            path: LinearFacts(pattern=NM(2, 4), shape=linear.shape, transposed=linear.transposed)
            for path, linear in all_linears(moved_model).items()
        }
        hashes = {path.name: file_sha256(path) for path in (tmp_path / name).glob("*.safetensors")}
        Facts(written_by="a test", linears=linears, masks_sha256=masks.sha256(), sha256=hashes).write(tmp_path / name)
        return tmp_path / name

    return make
