"""Pruning in an order of inputs of each linear's own."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.gathered import Gathered
from compressllm.core.launch import launched_ranks
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.run import Run
from compressllm.core.stats import InputStats
from compressllm.export.hf import PackedConfig
from compressllm.export.writer import export_model
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model
from compressllm.models.shards import file_sha256
from compressllm.models.survey import survey
from compressllm.prune.config import PermuteConfig, PruneConfig
from compressllm.prune.model import prune_model
from compressllm.prune.permute import permute_model
from compressllm.prune.sparsegpt import SparseGPT
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.model import quantize_model

FILES = ("model.safetensors", "masks.safetensors", "compressllm.json", "config.json")


@pytest.fixture
def prune(ids: str, folder: Path, tmp_path: Path) -> Callable[..., tuple[Bundle, Run]]:
    """``prune("a", gather=True)``: prune the dense checkpoint into a new folder of that name."""

    def into(name: str, show: Any = None, **settings: Any) -> tuple[Bundle, Run]:
        (tmp_path / name).mkdir(exist_ok=True)
        run = Run(folder=tmp_path / name, **({"show": show} if show else {}))
        config = PruneConfig(**{"calibration": {"source": ids}, "dtype": "float32", "gather": True} | settings)
        return prune_model(open_bundle(str(folder)), config, run), run

    return into


def hashes(into: Path) -> list[str]:
    return [file_sha256(into / "model" / name) for name in FILES]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "admm", "dsnot"])
def test_masks_hold_in_the_orders_and_keep_more(prune: Callable, method: str) -> None:
    bundle, run = prune("out", method=method)
    assert len(bundle.patterns) == len(bundle.masks) == len(run.records) == 21
    for name, pattern in bundle.patterns.items():
        assert isinstance(pattern, Gathered)
        assert pattern.base == NM(2, 4)
        assert pattern.violations(bundle.masks[name]) == 0
        assert int(bundle.masks[name].sum()) * 2 == bundle.masks[name].numel()
    assert any(NM(2, 4).violations(bundle.masks[name]) for name in bundle.masks)
    for row in run.records:
        assert row["pattern"] == "2:4 gathered"
        assert "order" not in row
        assert row["retained_before"] <= row["retained_after"]
    assert sum(row["retained_after"] - row["retained_before"] for row in run.records) > 0.2


def test_wandas_masks_are_the_best_of_each_group(prune: Callable, llama: PreTrainedModel, windows: Tensor) -> None:
    bundle, _ = prune("out")
    name = "model.layers.0.self_attn.q_proj"
    seen: list[Tensor] = []
    llama.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        llama(windows)
    score = llama.get_submodule(name).weight.abs() * seen[0].flatten(0, 1).square().mean(0).sqrt()
    order = list(bundle.patterns[name].order)
    groups = score[:, order].view(len(score), -1, 4)
    kept = bundle.masks[name][:, order].view(groups.shape)
    assert bool((groups.masked_fill(~kept, torch.inf).amin(-1) >= groups.masked_fill(kept, 0).amax(-1)).all())


def test_a_solver_sees_weights_and_statistics_in_the_order(
    prune: Callable, llama: PreTrainedModel, windows: Tensor
) -> None:
    bundle, _ = prune("out", method="sparsegpt")
    assert bundle.checkpoint is not None
    name = "model.layers.0.mlp.gate_proj"
    seen: list[Tensor] = []
    llama.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        llama(windows)
    x = seen[0].flatten(0, 1)
    order = list(bundle.patterns[name].order)
    ordered = InputStats(tokens=len(x), hessian=(x.T @ x / len(x))[order][:, order])
    wanted = SparseGPT().prune(llama.get_submodule(name).weight.detach()[:, order], ordered, NM(2, 4))
    found = bundle.checkpoint.read(f"{name}.weight")[:, order]
    assert (bundle.masks[name][:, order] != wanted.keep).float().mean() < 0.01
    same = (bundle.masks[name][:, order] == wanted.keep).all(1)
    assert torch.allclose(found[same], wanted.weight[same], atol=1e-4)


def test_only_the_linears_asked_for_and_only_those_with_groups(prune: Callable) -> None:
    bundle, _ = prune("out", gather={"only": ["*.down_proj", "*.o_proj"]}, patterns={"*.0.self_attn.o_proj": "0.5"})
    gathered = {name for name, pattern in bundle.patterns.items() if isinstance(pattern, Gathered)}
    assert {name.rpartition(".")[2] for name in gathered} == {"down_proj", "o_proj"}
    assert len(gathered) == 5
    assert bundle.patterns["model.layers.0.self_attn.o_proj"] == Unstructured(0.5, "row")


def test_survey_holds_linears_against_it_in_their_order(prune: Callable) -> None:
    bundle, _ = prune("out")
    for asked in (None, NM(2, 4), NM(4, 8)):
        _, rows = survey(bundle.checkpoint, asked)
        assert all(row.sound and "gathered" in str(row.pattern) for row in rows)
    _, rows = survey(bundle.checkpoint, NM(1, 4))
    assert not any(row.sound for row in rows)


def test_facts_keep_the_orders_through_packing(prune: Callable, tmp_path: Path) -> None:
    bundle, _ = prune("out")
    export_model(bundle.checkpoint, tmp_path / "packed", "packed")
    packed = open_bundle(str(tmp_path / "packed"))
    assert packed.patterns == bundle.patterns
    assert torch.equal(packed.masks["model.layers.1.mlp.up_proj"], bundle.masks["model.layers.1.mlp.up_proj"])
    facts = tmp_path / "packed" / "compressllm.json"
    damaged = json.loads(facts.read_text())
    up, down = (damaged["linears"][f"model.layers.0.mlp.{name}_proj"]["pattern"] for name in ("up", "down"))
    for order, reason in (
        ("AAAAAAAAAAA=", "gathered: its order does not name each of 2 inputs once"),
        ("AAAAA", "gathered: its order is damaged"),
        (None, "is no pattern"),
        (down["order"], "32 inputs, and the order of 2:4 gathered is of 48"),
    ):
        up["order"] = order
        facts.write_text(json.dumps(damaged))
        with pytest.raises(FormatError, match=reason):
            Checkpoint(tmp_path / "packed")


def test_live_and_streamed_are_the_same(prune: Callable, llama: PreTrainedModel, ids: str) -> None:
    streamed, _ = prune("out")
    config = PruneConfig(calibration={"source": ids}, gather=True)
    live = prune_model(Bundle(llama), config, Run())
    assert live.patterns == streamed.patterns
    assert streamed.checkpoint is not None
    for name, linear in all_linears(llama).items():
        assert torch.equal(linear.weight, streamed.checkpoint.read(f"{name}.weight"))


def test_a_stopped_call_resumes_to_the_same_bytes(prune: Callable, tmp_path: Path) -> None:
    def stop(blocks: Iterable[Any], total: int, label: str) -> Iterable[Any]:
        for index, block in enumerate(blocks):
            if index == 2:
                raise KeyboardInterrupt
            yield block

    with pytest.raises(KeyboardInterrupt):
        prune("a", show=stop)
    _, run = prune("a")
    prune("b")
    assert run.metrics["resumed_at_block"] == 2
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_two_processes_find_the_orders_of_one(
    launch: Callable, folder: Path, ids: str, prune: Callable, tmp_path: Path
) -> None:
    alone, _ = prune("alone")
    (tmp_path / "shared").mkdir()

    def work(rank: int) -> bool:
        with launched_ranks() as ranks:
            config = PruneConfig(calibration={"source": ids}, dtype="float32", gather=True)
            run = Run(folder=tmp_path / "shared", ranks=ranks)
            made = prune_model(open_bundle(str(folder)), config, run)
            return made.patterns == alone.patterns

    assert launch(work) == [True, True]


def test_masks_that_were_gathered_are_refined_in_their_order(prune: Callable, tmp_path: Path) -> None:
    given, _ = prune("given")
    refined, run = prune("refined", gather=None, method="dsnot", masks=str(tmp_path / "given" / "model"))
    assert refined.patterns == given.patterns
    for name, pattern in refined.patterns.items():
        assert pattern.violations(refined.masks[name]) == 0
    assert any(not torch.equal(refined.masks[name], given.masks[name]) for name in given.masks)
    assert all(row["pattern"] == "2:4 gathered" for row in run.records)


def test_what_is_pruned_in_an_order_is_not_permuted(prune: Callable) -> None:
    bundle, _ = prune("out")
    with pytest.raises(FormatError, match="is pruned already"):
        permute_model(bundle, PermuteConfig(), Run())


def test_settings_that_make_no_sense(prune: Callable) -> None:
    with pytest.raises(ValidationError, match=r"0\.5 has no groups that an order of inputs matters to"):
        PruneConfig(pattern="0.5", gather=True)
    with pytest.raises(ValidationError, match="masks have their order already"):
        PruneConfig(masks="somewhere", gather=True)
    with pytest.raises(ValidationError, match="does not score weights one by one"):
        PruneConfig(gather={"score": "sparsegpt"})
    with pytest.raises(RecipeError, match=r"gather.only: '\*.k_prj' matches no linear to prune"):
        prune("out", gather={"only": ["*.k_prj"]})
    assert PruneConfig(gather=False).gather is None


def test_every_architecture(decoder: PreTrainedModel, ids: str, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    config = PruneConfig(calibration={"source": ids}, dtype="float32", gather={"rounds": 4})
    bundle = prune_model(open_bundle(str(tmp_path / "model")), config, Run(folder=tmp_path / "out"))
    assert bundle.checkpoint is not None
    assert all(isinstance(pattern, Gathered) for pattern in bundle.patterns.values())
    _, rows = survey(bundle.checkpoint, NM(2, 4))
    assert all(row.sound for row in rows)
    export_model(bundle.checkpoint, tmp_path / "packed", "packed")
    packed = open_bundle(str(tmp_path / "packed"))
    assert packed.patterns == bundle.patterns
    _, rows = survey(Checkpoint(tmp_path / "packed"), NM(2, 4))
    assert all(row.sound for row in rows)
    (tmp_path / "codes").mkdir()
    config = QuantizeConfig(scheme="int4-g32", method="rtn")
    quantized = quantize_model(bundle, config, Run(folder=tmp_path / "codes"))
    _, rows = survey(quantized.checkpoint, NM(2, 4))
    assert all(row.sound for row in rows)
    folder = tmp_path / "codes" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, variant="packed")
    dense = AutoModelForCausalLM.from_pretrained(
        folder, variant="packed", quantization_config=PackedConfig(backend="dense")
    )
    ids_of = torch.arange(8)[None]
    torch.testing.assert_close(model(ids_of).logits, dense(ids_of).logits, rtol=5e-2, atol=5e-2)
    plain = load_model(quantized.checkpoint)
    torch.testing.assert_close(dense(ids_of).logits, plain(ids_of).logits.to(dense.dtype))
