"""The wheel: the same bytes every time, and everything in it that is needed without a checkout."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import compressllm

ROOT = Path(compressllm.__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "compressllm", "recipes")


def build(folder: Path) -> Path:
    """A wheel of a copy of the checkout, so that nothing that lies around in it helps."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("one")), build(tmp_path_factory.mktemp("another"))


def test_two_builds_are_the_same_bytes(wheels: tuple[Path, Path]) -> None:
    one, other = (hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    assert one == other


def test_all_that_is_not_python_is_in_it(wheels: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(wheels[0]).namelist())
    sources = [
        path for path in (ROOT / "compressllm").rglob("*") if path.suffix in {".c", ".h", ".cu", ".typed", ".py"}
    ]
    assert {".c", ".h", ".cu", ".typed"} <= {path.suffix for path in sources}
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    recipes = [path.name for path in (ROOT / "recipes").glob("*.yaml")]
    assert "demo.yaml" in recipes
    data = {name.partition(".data/data/")[2] for name in names}
    assert {f"share/compressllm/recipes/{name}" for name in recipes} <= data
