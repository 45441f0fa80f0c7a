"""The small runs of benchmarks/workloads.py, in forked children."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from kill_matrix import Matrix  # noqa: E402 (found by the line above)


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of every stage, of which each undisturbed one is made once."""
    return Matrix(tmp_path_factory.mktemp("matrix"), seed=1)
