"""The recipes that come with the package."""

from __future__ import annotations

import sys
from pathlib import Path

import compressllm
from compressllm.core.errors import RecipeError
from compressllm.core.registry import did_you_mean


def shipped_recipes() -> dict[str, Path]:
    """Name -> file. They lie beside the package in a source checkout, and in the environment's data when installed."""
    beside = Path(compressllm.__file__).parent.parent / "recipes"
    for folder in (beside, Path(sys.prefix) / "share" / "compressllm" / "recipes"):
        if found := sorted(folder.glob("*.yaml")):
            return {path.stem: path for path in found}
    return {}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name. Raises RecipeError with the nearest name."""
    path, shipped = Path(name), shipped_recipes()
    if path.is_file() or path.suffix in {".yaml", ".yml"}:
        return path
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"no recipe file and no recipe called {name!r}{did_you_mean(name, shipped)} Known: {', '.join(shipped)}"
    )
