"""The same seed gives the same masks and weights, bit for bit, on any number of threads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compressllm.core.protocols import PRUNERS, QUANTIZERS
from compressllm.models.bundle import open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.stages.recipe import make_recipe
from compressllm.stages.runner import run_recipe

TEXT = str(Path(__file__).parents[1] / "tiny" / "calibration.txt")
LOOK = {"source": TEXT, "samples": 5, "seqlen": 32}
THREADS = (1, 2, 4)


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def made(model: Path, stage: dict[str, Any], out: Path, threads: int) -> tuple[str | None, dict[str, str]]:
    """Hash of the masks, and of each weight file."""
    torch.set_num_threads(threads)
    run_recipe(make_recipe({"model": str(model), "seed": 5, "stages": [stage]}), out)
    facts = Checkpoint(out / "model").facts
    assert facts is not None
    return facts.masks_sha256, facts.sha256


def same(model: Path, stage: dict[str, Any], folder: Path) -> None:
    found = [made(model, stage, folder / str(threads), threads) for threads in THREADS]
    assert found[0][1]
    assert found[1:] == found[:-1]


@pytest.fixture(scope="session")
def start(matrix: Any) -> Path:
    """The folder with the dense model of two blocks, and a pruned one."""
    return Path(matrix.workloads.scratch)


@pytest.mark.parametrize("name", PRUNERS.names())
def test_pruners(name: str, start: Path, tmp_path: Path) -> None:
    pattern = "0.5/layer" if name in {"admm", "sparsegpt"} else "2:4"
    same(start / "dense", {"prune": {"method": name, "pattern": pattern, "calibration": LOOK}}, tmp_path)


@pytest.mark.parametrize("more", [{"order": "sequential"}, {"reconstruct": {"epochs": 1}}], ids=["in turn", "rebuilt"])
def test_ways_to_prune(more: dict[str, Any], start: Path, tmp_path: Path) -> None:
    same(start / "dense", {"prune": {"method": "sparsegpt", "calibration": LOOK, **more}}, tmp_path)


@pytest.mark.parametrize("name", QUANTIZERS.names())
def test_quantizers(name: str, start: Path, tmp_path: Path) -> None:
    same(start / "pruned" / "model", {"quantize": {"method": name, "calibration": LOOK}}, tmp_path)


@pytest.mark.parametrize("losses", ["kl=1.0", "kl=1.0,squarehead=0.5"])
def test_recovery(losses: str, start: Path, tmp_path: Path) -> None:
    settings = {
        "teacher": str(start / "dense"), "data": [TEXT], "seqlen": 48, "batch_tokens": 192, "micro_batch": 1,
        "max_tokens": 960, "losses": losses, "masking": "ast", "refresh": 2, "lr": 1e-3,
    }  # fmt: skip
    same(start / "pruned" / "model", {"recover": settings}, tmp_path)
    assert open_bundle(str(tmp_path / "1")).masks.sparsity() == 0.5
