"""A checkpoint to prune, and token ids to calibrate on."""

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor
from transformers import PreTrainedModel


@pytest.fixture
def ids(windows: Tensor, tmp_path: Path) -> str:
    """The windows as a file of token ids."""
    np.save(tmp_path / "ids.npy", windows.numpy())
    return str(tmp_path / "ids.npy")


@pytest.fixture
def folder(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """The tiny Llama as a float32 checkpoint."""
    llama.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"
