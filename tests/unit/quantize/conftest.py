from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from compressllm.core.run import Run
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.model import quantize_model


@pytest.fixture
def ids(tmp_path: Path, windows: Tensor) -> str:
    np.save(tmp_path / "ids.npy", windows.numpy())
    return str(tmp_path / "ids.npy")


@pytest.fixture
def sparse(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """The tiny Llama at 2:4 but for its output projections, which are dense."""
    (tmp_path / "pruned").mkdir()
    config = PruneConfig(method="magnitude", pattern="2:4", skip=("*.o_proj",))
    prune_model(open_bundle(str(tiny_llama_folder)), config, Run(folder=tmp_path / "pruned"))
    return tmp_path / "pruned" / "model"


@pytest.fixture
def quantized(sparse: Path, ids: str, tmp_path: Path) -> Callable[..., tuple[Bundle, Run]]:
    """Quantises a checkpoint, that of `sparse` unless told, in a folder of the name given; the bundle and its run."""

    def make(name: str = "out", folder: Path = sparse, **settings: Any) -> tuple[Bundle, Run]:
        (tmp_path / name).mkdir()
        run = Run(folder=tmp_path / name)
        config = QuantizeConfig(**{"dtype": "float32", "calibration": {"source": ids}, **settings})
        return quantize_model(open_bundle(str(folder)), config, run), run

    return make
