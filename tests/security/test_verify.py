"""``verify`` finds any changed bit of what we wrote."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compressllm.core.errors import FormatError
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import FILE_NAME
from compressllm.models.seal import SUMS_NAME, broken_seals
from compressllm.models.survey import damaged_files

INPUTS = ("pruned", "dense", "packed", "shards", "int4-g32", "fp8")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in every form that we write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        from fuzz_inputs import make_inputs

    return make_inputs(tmp_path_factory.mktemp("written"))


def places(size: int, chance: random.Random) -> list[int]:
    """Which bytes to change: the first, the last, those where a header begins and some between."""
    return sorted({0, 7, 8, 9, size // 2, size - 2, size - 1, *(chance.randrange(size) for _ in range(20))})


@pytest.mark.parametrize("name", INPUTS)
def test_any_flipped_bit_is_found(written: dict[str, Path], name: str) -> None:
    folder, chance = written[name], random.Random(0)
    files = sorted(folder.iterdir())
    assert {"config.json", FILE_NAME, SUMS_NAME} <= {path.name for path in files}
    known = Checkpoint(folder).facts.sha256
    assert broken_seals(folder, known) == []
    for path in files:
        good = path.read_bytes()
        for place in places(len(good), chance):
            bad = bytearray(good)
            bad[place] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            found = broken_seals(folder, known)
            assert found == [path.name] if path.name != SUMS_NAME else found, (path.name, place)
        path.write_bytes(good)
    assert broken_seals(folder, known) == []


@pytest.mark.parametrize("name", INPUTS)
def test_a_lost_file_is_found(written: dict[str, Path], name: str) -> None:
    folder = written[name]
    for path in sorted(folder.iterdir()):
        if path.name == SUMS_NAME:
            continue
        good = path.read_bytes()
        path.unlink()
        try:
            found = damaged_files(Checkpoint(folder))
        except FormatError:
            found = [path.name]
        path.write_bytes(good)
        assert found == [path.name]


def test_sha256sum_agrees(written: dict[str, Path]) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS_NAME], cwd=written["packed"], check=False, capture_output=True
    )
    assert done.returncode == 0, done.stdout


def damage(folder: Path, change: Callable[[str], str]) -> list[str]:
    path = folder / SUMS_NAME
    good = path.read_text()
    path.write_text(change(good))
    found = broken_seals(folder, {})
    path.write_text(good)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"{'0' * 64}  ../model.safetensors\n" + text,
        lambda text: f"{'0' * 64}  /etc/passwd\n" + text,
        lambda text: text.upper(),
        lambda text: text[:-1],
        lambda text: "",
        lambda text: "".join(text.splitlines(keepends=True)[:-1]),
        lambda text: text + "\n",
    ],
)
def test_sums_that_are_not_ours_are_damage(written: dict[str, Path], change: Callable[[str], str]) -> None:
    assert damage(written["packed"], change) == [SUMS_NAME]
