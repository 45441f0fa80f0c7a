"""The same results on a CUDA device, up to float noise."""

import pytest
import torch

pytest.importorskip("pydantic", reason="needs the package pydantic")

from compressllm.calibration.walker import WalkOptions, walk_blocks
from compressllm.core.protocols import PRUNERS
from compressllm.core.run import Run
from compressllm.models.bundle import open_bundle
from compressllm.models.weights import LiveWeights
from compressllm.prune import PruneConfig, prune_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_walk_on_cuda_collects_what_the_cpu_does(llama, windows) -> None:
    on_cpu = [
        block.collect(frozenset({"sqnorm", "hessian"})) for block in walk_blocks(llama, windows, LiveWeights(llama))
    ]
    llama.to("cuda")
    options = WalkOptions(device=torch.device("cuda"))
    walk = walk_blocks(llama, windows, LiveWeights(llama), options)
    for block, expected in zip(walk, on_cpu, strict=True):
        for name, stats in block.collect(frozenset({"sqnorm", "hessian"})).items():
            torch.testing.assert_close(stats.sqnorm.cpu(), expected[name].sqnorm, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(stats.hessian.cpu(), expected[name].hessian, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", PRUNERS.names())
def test_pruning_on_cuda_keeps_what_the_cpu_keeps(tiny_llama_folder, windows, tmp_path, method) -> None:
    import numpy as np

    np.save(tmp_path / "ids.npy", windows.numpy())
    kept = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        config = PruneConfig(
            method=method, device=device, dtype="float32", calibration={"source": str(tmp_path / "ids.npy")}
        )
        kept[device] = prune_model(open_bundle(str(tiny_llama_folder)), config, Run(folder=folder)).masks
    for name, keep in kept["cpu"].items():
        # Solvers choose by weights they have changed, so a rounding that tips one choice tips some behind it.
        most = 0.02 if method in {"sparsegpt", "admm"} else 0.002
        assert (keep != kept["cuda"][name]).float().mean() <= most, name
