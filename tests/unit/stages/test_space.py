from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from compressllm.core.errors import RunError
from compressllm.models.bundle import open_bundle
from compressllm.stages.recipe import make_recipe
from compressllm.stages.runner import check_recipe, run_recipe
from compressllm.stages.space import check_space, needed_space, total_space

TINY = Path(__file__).parents[2] / "tiny"
LOOK = {"source": str(TINY / "calibration.txt"), "samples": 2, "seqlen": 32}
STAGES: list[Any] = [
    {"permute": {"score": "magnitude", "rounds": 1}},
    {"prune": {"method": "magnitude", "pattern": "2:4"}},
    {"quantize": {"method": "rtn", "scheme": "int8"}},
    {"eval": {"source": str(TINY / "eval.txt"), "seqlen": 32, "windows": 1, "backend": "dense"}},
]


def recipe(*stages: Any) -> Any:
    return make_recipe({"model": str(TINY / "model"), "seed": 0, "stages": list(stages)})


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_the_estimate_is_near_what_each_stage_writes(tmp_path: Path) -> None:
    asked = recipe(*STAGES)
    needed = needed_space(asked, open_bundle(asked.model))
    run_recipe(asked, tmp_path / "out")
    found = [weights(tmp_path / "out" / folder) for folder in ("01-permute/model", "02-prune/model", "model")]
    for one, size in zip(needed, found, strict=False):
        assert 0.8 * size < one.left < 1.1 * size
    assert (needed[3].stage, needed[3].peak) == ("eval", 0)


def test_packed_exports_are_counted_packed(tmp_path: Path) -> None:
    asked = recipe(STAGES[1], {"export": {"format": "packed"}})
    needed = needed_space(asked, open_bundle(asked.model))
    run_recipe(asked, tmp_path / "out")
    assert needed[1].left == pytest.approx(weights(tmp_path / "out" / "model"), rel=0.1)


def test_checkpoints_of_a_training_are_counted() -> None:
    asked = recipe(STAGES[1], {"recover": {"losses": "ce=1.0", "data": [str(TINY / "calibration.txt")]}})
    needed = needed_space(asked, open_bundle(asked.model))
    assert needed[1].peak >= 28 * 345_024
    assert total_space(needed) == needed[0].left + needed[1].peak


def test_what_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked = recipe(*STAGES)
    bundle = open_bundle(asked.model)
    total = total_space(needed_space(asked, bundle))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, total - 100_000))
    with pytest.raises(
        RunError, match=r"needs about 3\.\d MB of disk space \(permute 1\.4 MB, .*\), 3\.\d MB are free"
    ):
        run_recipe(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "model.safetensors").write_bytes(bytes(200_000))
    check_space(needed_space(asked, bundle), tmp_path, tmp_path / "begun")  # what is there is not needed again
    assert check_recipe(asked)[-1] == f"disk space: about {total / 1e6:.1f} MB"
