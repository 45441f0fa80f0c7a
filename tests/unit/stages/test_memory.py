"""What stages are estimated to take, what is done where that is not there, and where it turns out not to be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compressllm.core import memory
from compressllm.core.errors import OutOfMemoryError, RunError
from compressllm.core.memory import MemoryNeed, available_bytes, peak_of
from compressllm.core.run import JOURNAL, Run
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.stages import runner
from compressllm.stages.memory import OVERRIDE, check_memory, estimate
from compressllm.stages.recipe import make_recipe
from compressllm.stages.runner import run_recipe
from compressllm.stages.sizes import sizes_of
from compressllm.stages.stage import STAGES

TINY = str(Path(__file__).parents[2] / "tiny" / "model")
CPU = torch.device("cpu")


def config(stage: str, **settings: Any) -> Any:
    return make_recipe({"model": TINY, "stages": [{stage: settings}]}).steps()[0][1]


def test_phases_come_one_after_the_other() -> None:
    need = peak_of({"first": {"a": 1, "b": 2}, "second": {"c": 10}, "none": {}}, "lower c")
    assert need == MemoryNeed({"c": 10}, "lower c")
    assert str(MemoryNeed({"small": 10**7, "large": 3 * 10**9}, "")) == "3.0 GB of large"


def test_sizes_are_those_of_the_model() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=1000, **shape, tie_word_embeddings=True))
    sizes = sizes_of(Bundle(model.bfloat16(), None), torch.float32, CPU)
    assert (sizes.stored, sizes.computed, sizes.both) == (2, 4, 6)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.block == sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert sizes.outside == 1000 * 64 + 64
    assert sizes.largest == 1000 * 64
    assert sizes.linear == 64 * 160
    assert sizes.grams == 3 * 64**2 + 160**2  # q, k and v; o; gate and up; down
    assert sizes.sparse == 3 * (4 * 64**2 + 3 * 64 * 160)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_an_estimate(stage: str) -> None:
    bundle = open_bundle(TINY)
    settings = {"losses": "ce=1.0"} if stage == "recover" else {}
    need = estimate(stage, bundle, config(stage, **settings))
    assert need.bytes > 0
    assert need.lower


def test_what_is_lowered_lowers_the_estimate() -> None:
    bundle = open_bundle(TINY)

    def bytes_of(stage: str, **settings: Any) -> int:
        return estimate(stage, bundle, config(stage, **settings)).bytes

    many, few = ({"samples": n, "seqlen": 256} for n in (20_000, 100))
    assert bytes_of("prune", method="wanda", calibration=many) > 10 * bytes_of("prune", method="wanda", calibration=few)
    assert bytes_of("prune", method="sparsegpt", calibration=few) > bytes_of("prune", method="wanda", calibration=few)
    whole = bytes_of("recover", losses="ce=1.0", micro_batch=64, batch_tokens=65536)
    assert bytes_of("recover", losses="ce=1.0", micro_batch=1, batch_tokens=65536) < whole
    lean = bytes_of("recover", losses="ce=1.0", micro_batch=64, batch_tokens=65536, activation_checkpointing=True)
    assert lean < whole


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of memory left."""
    monkeypatch.setattr("compressllm.stages.memory.available_bytes", lambda: 1_000_000)


@pytest.mark.usefixtures("little")
def test_a_stage_that_does_not_fit_is_refused_with_what_to_lower(tmp_path: Path) -> None:
    recipe = make_recipe({"model": TINY, "stages": [{"prune": {"method": "magnitude"}}]})
    with pytest.raises(RunError, match=r"^prune: needs about .* GB .* left \(.*\); lower calibration") as caught:
        run_recipe(recipe, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("little")
def test_it_can_be_tried_all_the_same_and_that_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "0")
    recipe = make_recipe({"model": TINY, "stages": [{"prune": {"method": "magnitude"}}]})
    (stage,) = run_recipe(recipe, tmp_path / "run")["stages"]
    assert stage["warnings"][0].startswith("prune: needs about")
    assert stage["estimated_memory_bytes"] > 0


def test_a_stage_that_hardly_fits_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    run, need = Run(), MemoryNeed({"model": 9 * 10**9}, "lower seqlen")
    monkeypatch.setattr("compressllm.stages.memory.available_bytes", lambda: 10 * 10**9)
    check_memory("eval", need, config("eval", device="cpu"), run)
    assert run.warnings == ["eval: needs about 9.0 GB of memory, 10.0 GB are left (9.0 GB of model); lower seqlen"]
    for left in (12 * 10**9, None):
        monkeypatch.setattr("compressllm.stages.memory.available_bytes", lambda left=left: left)
        check_memory("eval", need, config("eval", device="cpu"), run)
    assert len(run.warnings) == 1


def test_what_is_left_is_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = available_bytes()
    assert left is not None
    assert left > 0
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert available_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (available_bytes() or 0) > 600_000


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_is_one_line_and_keeps_what_was_finished(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(bundle: Any, config: Any, run: Run) -> Any:
        assert run.folder
        (run.folder / JOURNAL).write_text(json.dumps({}))
        raise error

    monkeypatch.setitem(runner.STAGES, "prune", dataclasses.replace(STAGES["prune"], run=work))
    recipe = make_recipe({"model": TINY, "stages": [{"prune": {"method": "magnitude"}}]})
    with pytest.raises(OutOfMemoryError, match=r"^prune: the (device|machine) ran out of memory") as caught:
        run_recipe(recipe, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "run" / "01-prune" / JOURNAL).exists()
