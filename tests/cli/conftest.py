"""Run the command line in this process, as the console script does."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compressllm.cli.app import main

TINY = Path(__file__).parent.parent / "tiny"


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``cli("prune", model, out, "--method", "wanda")``."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["compressllm", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def tiny() -> str:
    """The trained tiny model's folder."""
    return str(TINY / "model")


@pytest.fixture
def text() -> str:
    """Text for calibration and evaluation."""
    return str(TINY / "calibration.txt")
