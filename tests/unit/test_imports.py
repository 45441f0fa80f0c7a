"""The direction of imports, as docs/architecture.md draws it."""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

import compressllm

ROOT = Path(compressllm.__file__).parent
METHODS = {"prune", "recover", "quantize", "export", "eval", "select", "contextual"}

#: Room -> the rooms it may import from, besides itself. "compressllm" is the package's own __init__.
MAY_IMPORT = {
    "core": set(),
    "kernels": {"core"},
    "models": {"core", "compressllm"},
    "calibration": {"models", "core"},
    "prune": {"calibration", "models", "core"},
    "recover": {"calibration", "models", "core", "compressllm"},
    "quantize": {"calibration", "models", "core"},
    "export": {"kernels", "calibration", "models", "core", "compressllm"},
    "eval": {"calibration", "models", "core"},
    "select": {"calibration", "models", "core"},
    "contextual": {"kernels", "calibration", "models", "core"},
    "stages": {
        "prune",
        "recover",
        "quantize",
        "export",
        "eval",
        "select",
        "contextual",
        "kernels",
        "calibration",
        "models",
        "core",
        "compressllm",
    },
    "bench": {"stages", "eval", "kernels", "models", "core"},
    "report": {"bench", "stages", "eval", "core"},
    "cli": {
        "report",
        "bench",
        "stages",
        "prune",
        "recover",
        "quantize",
        "export",
        "eval",
        "select",
        "contextual",
        "kernels",
        "calibration",
        "models",
        "core",
        "compressllm",
    },
    "__main__": {"cli"},
}


class Import(NamedTuple):
    """One import of ours: ``names`` is empty for a plain ``import module``."""

    where: str
    room: str
    module: str
    names: tuple[str, ...]


def room_of(module: str) -> str:
    """The room a dotted module lies in; the package itself counts as one."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports_of(path: Path) -> list[Import]:
    """Every import of ours in a file: at the top, in functions, and under TYPE_CHECKING."""
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found += [Import(where, room, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: is a relative import, which this test cannot follow; write it in full"
            names = tuple(alias.name for alias in node.names)
            if node.module == "compressllm":  # `from compressllm import export` reaches into a room
                rooms = [name for name in names if (ROOT / name).is_dir()]
                found += [Import(where, room, f"compressllm.{name}", ()) for name in rooms]
                names = tuple(name for name in names if name not in rooms)
            if names:
                found.append(Import(where, room, node.module or "", names))
    return [one for one in found if one.module.split(".")[0] == "compressllm"]


FILES = sorted(ROOT.rglob("*.py"))
IMPORTS = [one for path in FILES for one in imports_of(path)]


def test_every_package_was_read() -> None:
    packages = {path.parent.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT}
    assert packages == set(MAY_IMPORT) - {"__main__"}, "a room is missing from MAY_IMPORT, or from the package"
    importing = {one.room for one in IMPORTS}
    assert packages <= importing, f"no import was seen in {sorted(packages - importing)}"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_one_way(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = [
        f"{one.where}: {room} imports {one.module}"
        for one in IMPORTS
        if one.room == room and room_of(one.module) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_method_packages_do_not_know_each_other() -> None:
    # Said by MAY_IMPORT too; said again, so that an edit of that table cannot quietly undo it.
    for one in IMPORTS:
        if one.room in METHODS:
            assert room_of(one.module) not in METHODS - {one.room}, f"{one.where}: imports {one.module}"


def test_the_package_itself_gives_only_its_version_to_rooms() -> None:
    """Rooms read ``__version__`` and the package's path; the public functions are for users."""
    for one in IMPORTS:
        if one.module == "compressllm" and one.names:
            assert one.names == ("__version__",), f"{one.where}: imports {', '.join(one.names)} from compressllm"


def test_reads_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "core"
    room.mkdir()
    (tmp_path / "cli").mkdir()
    (room / "one.py").write_text(
        "import torch, compressllm.models.facts\n"
        "from typing import TYPE_CHECKING\n"
        "from compressllm import cli, __version__\n"
        "if TYPE_CHECKING:\n    from compressllm.stages.runner import run_recipe\n"
        "def f():\n    import compressllm.export as e\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    seen = {(one.room, one.module) for one in imports_of(room / "one.py")}
    modules = ("models.facts", "cli", "stages.runner", "export")
    assert seen == {("core", "compressllm"), *(("core", f"compressllm.{module}") for module in modules)}
