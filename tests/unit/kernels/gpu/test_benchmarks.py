"""The GPU benchmarks on a machine without a GPU."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


@pytest.mark.parametrize("name", ["gpu_kernels", "gpu_decode"])
def test_one_line_where_there_is_no_gpu(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("sys.argv", [name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module(name).main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: bench-gpu: needs a CUDA device; this machine or this build of torch has none\n"
