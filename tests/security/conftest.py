"""A watch over what the process does, and a small checkpoint to poison."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = Path(__file__).parents[1] / "tiny" / "model"


@pytest.fixture(scope="session")
def watch() -> Any:
    """`fuzz_watch.Watch`: notes files opened, programs started and code run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from fuzz_watch import Watch

    return Watch()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


class _Poison:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.mkdir, (str(self._folder),)


@pytest.fixture
def pwned(tmp_path: Path) -> Path:
    """A folder that is there once poisoned code has run."""
    return tmp_path / "pwned"


@pytest.fixture
def poison(pwned: Path) -> bytes:
    """A pickle that makes it."""
    return pickle.dumps(_Poison(pwned))


@pytest.fixture
def code(pwned: Path) -> str:
    """A Python module that makes it."""
    return f"import os\nos.mkdir({str(pwned)!r})\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
