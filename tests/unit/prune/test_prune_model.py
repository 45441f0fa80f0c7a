import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compressllm.core.errors import CalibrationError, FormatError, RunError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.run import Run
from compressllm.models import journal, record
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model
from compressllm.models.shards import file_sha256
from compressllm.models.survey import survey
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model

FILES = ("model.safetensors", "masks.safetensors", "compressllm.json", "config.json")


def settings(ids: str | None, method: Any = "wanda", pattern: str = "2:4", **more: Any) -> PruneConfig:
    calibration = {"source": ids} if ids else {"source": "builtin"}
    return PruneConfig(**{"method": method, "pattern": pattern, "calibration": calibration, "dtype": "float32"} | more)


def prune_folder(folder: Path, config: PruneConfig, into: Path, **run: Any) -> tuple[Bundle, Run]:
    into.mkdir(exist_ok=True)
    made = Run(folder=into, **run)
    return prune_model(open_bundle(str(folder)), config, made), made


def hashes(into: Path) -> list[str]:
    return [file_sha256(into / "model" / name) for name in FILES]


def prune_slowly(model: PreTrainedModel, windows: Tensor, pattern: SparsityPattern) -> dict[str, Tensor]:
    """Wanda by its paper's loop: whole forwards, one window at a time, a sort for every group. Changes the model."""
    masks: dict[str, Tensor] = {}
    for block in model.model.layers:
        squares: dict[torch.nn.Module, Tensor] = {}

        def note(
            module: torch.nn.Module, args: tuple[Tensor], squares: dict[torch.nn.Module, Tensor] = squares
        ) -> None:
            squares[module] = squares.get(module, torch.zeros(())) + args[0].flatten(0, -2).double().square().sum(0)

        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        handles = [module.register_forward_pre_hook(note) for module in linears]
        with torch.no_grad():
            for window in windows:
                model(window[None])
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            if module in linears:
                score = (module.weight.abs().double() * squares[module].sqrt()).tolist()
                keep = torch.ones_like(module.weight, dtype=torch.bool)
                for row in range(len(score)):
                    size = pattern.m if isinstance(pattern, NM) else len(score[row])
                    remove = size - pattern.n if isinstance(pattern, NM) else int(size * pattern.fraction)
                    for at in range(0, len(score[row]), size):
                        order = sorted(range(at, at + size), key=score[row].__getitem__)
                        keep[row, order[:remove]] = False
                module.weight.data[~keep] = 0.0
                masks[name] = keep
    return masks


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), Unstructured(0.5, "row")], ids=str)
def test_wanda_is_the_papers_loop(
    llama: PreTrainedModel, windows: Tensor, ids: str, folder: Path, tmp_path: Path, pattern: SparsityPattern
) -> None:
    slow = copy.deepcopy(llama)
    expected = prune_slowly(slow, windows, pattern)
    live = prune_model(Bundle(llama), settings(ids, pattern=str(pattern)))
    streamed, _ = prune_folder(folder, settings(ids, pattern=str(pattern)), tmp_path / "out")
    for bundle in (live, streamed):
        assert list(bundle.masks) == list(expected)
        assert all(torch.equal(bundle.masks[name], keep) for name, keep in expected.items())
        assert set(bundle.patterns.values()) == {pattern}
        weights = bundle.live().state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in slow.state_dict().items())


@pytest.mark.parametrize(
    ("method", "order"),
    [("random", "parallel"), ("magnitude", "parallel"), ("wanda", "parallel"), ("sparsegpt", "sequential")],
)
def test_live_and_streamed_are_the_same_for_every_architecture(
    decoder: PreTrainedModel, ids: str, tmp_path: Path, method: str, order: str
) -> None:
    decoder.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    if any(linear.expert is not None for linear in all_linears(decoder).values()):
        order = "parallel"  # experts have no turn
    config = settings(ids, method, dtype="bfloat16", order=order)
    run = Run()
    live = prune_model(Bundle(load_model(tmp_path / "dense")), config, run)
    streamed, streamed_run = prune_folder(tmp_path / "dense", config, tmp_path / "out")
    assert streamed.masks.sha256() == live.masks.sha256()
    expected, weights = live.model.state_dict(), streamed.live().state_dict()
    assert all(torch.equal(raw(weights[name]), raw(tensor)) for name, tensor in expected.items())
    assert streamed_run.records == run.records
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert all(torch.equal(raw(loaded[name]), raw(tensor)) for name, tensor in expected.items())


def test_what_stays_keeps_its_bits_and_what_goes_is_plus_zero(
    tiny_llama_folder: Path, ids: str, tmp_path: Path
) -> None:
    bundle, _ = prune_folder(tiny_llama_folder, settings(ids, pattern="4:8", skip=("*.o_proj",)), tmp_path / "out")
    before, after = (
        load_file(tiny_llama_folder / "model.safetensors"),
        load_file(tmp_path / "out/model/model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = raw(tensor).clone()
        if (linear := name.removesuffix(".weight")) in bundle.masks:
            expected[~bundle.masks[linear]] = 0
        assert torch.equal(raw(after[name]), expected), name
    count, rows = survey(Checkpoint(tmp_path / "out" / "model"))
    rows = list(rows)
    assert count == len(rows) == 21
    assert all(row.sound for row in rows)
    assert {row.name.split(".")[-1]: row.sparsity for row in rows}["o_proj"] == 0.0
    assert sorted(set(all_linears(bundle.model)) - set(bundle.masks)) == [
        f"model.layers.{index}.self_attn.o_proj" for index in range(3)
    ]


def test_every_linear_is_logged_with_its_error(llama: PreTrainedModel, ids: str) -> None:
    before = copy.deepcopy(llama)
    run = Run()
    bundle = prune_model(Bundle(llama), settings(ids, "magnitude"), run)
    assert [row["linear"] for row in run.records] == list(all_linears(llama))
    for row in run.records:
        was, now = (model.get_parameter(f"{row['linear']}.weight").detach() for model in (before, llama))
        expected = float((was - now).square().sum() / was.square().sum())
        assert row["error"] == pytest.approx(expected, rel=1e-5)
        assert 0.0 < row["error"] < 0.5
        assert (row["pattern"], row["sparsity"], row["tokens"]) == ("2:4", 0.5, 0)
    assert run.metrics["sparsity"] == 0.5
    assert run.metrics["linears"] == 21
    assert run.metrics["masks_sha256"] == bundle.masks.sha256()
    assert run.metrics["calibration"] is None


def test_wandas_rows_count_tokens(llama: PreTrainedModel, ids: str) -> None:
    run = Run()
    prune_model(Bundle(llama), settings(ids), run)
    assert {row["tokens"] for row in run.records} == {7 * 16}
    assert run.metrics["calibration"]["windows"] == 7


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda"])
def test_the_same_call_gives_the_same_files(folder: Path, ids: str, tmp_path: Path, method: str) -> None:
    for out in ("a", "b"):
        prune_folder(folder, settings(ids, method), tmp_path / out)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    facts = json.loads((tmp_path / "a/model/compressllm.json").read_text())
    assert facts["sha256"] == {name: file_sha256(tmp_path / "a/model" / name) for name in FILES[:2]}
    assert facts["masks_sha256"] == open_bundle(str(tmp_path / "a")).masks.sha256()


def test_the_seed_of_the_run_reaches_the_method(llama: PreTrainedModel, ids: str) -> None:
    def sha256(seed: int, method: Any = "random") -> str:
        return prune_model(Bundle(copy.deepcopy(llama)), settings(ids, method), Run(seed=seed)).masks.sha256()

    assert sha256(0) == sha256(0) != sha256(1)
    assert sha256(0, {"random": {"seed": 1}}) == sha256(1)
    assert sha256(0, "wanda") == sha256(1, "wanda")  # token ids are used as given


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_the_number_of_threads_changes_nothing(
    build_model: Callable[..., PreTrainedModel], tmp_path: Path, order: str
) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    np.save(tmp_path / "ids.npy", torch.randint(3, 64, (32, 128), generator=torch.Generator().manual_seed(0)).numpy())
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            model = build_model(LlamaConfig(vocab_size=64, pad_token_id=0, **shape))
            found.append(prune_model(Bundle(model), settings(str(tmp_path / "ids.npy"), order=order)).masks.sha256())
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


def test_limits_of_memory_change_nothing(folder: Path, ids: str, tmp_path: Path) -> None:
    for out, limit in (("a", 4.0), ("b", 0.0)):
        prune_folder(folder, settings(ids, activation_memory_gb=limit), tmp_path / out)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["model", "progress.json"]


def test_a_checkpoint_needs_a_folder_to_go_to(folder: Path, ids: str) -> None:
    with pytest.raises(FormatError, match="give the run a folder"):
        prune_model(open_bundle(str(folder)), settings(ids))


# --- what the input may hold ---


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_weights_that_are_not_finite_name_the_linear(
    folder: Path, ids: str, tmp_path: Path, method: str, bad: float, name: str
) -> None:
    rewrite(folder, lambda tensors: tensors[f"{name}.weight"][3].fill_(bad))
    message = rf"^{name}\.weight: holds \d+ values that are not finite$"
    with pytest.raises(FormatError, match=message):
        prune_folder(folder, settings(ids, method), tmp_path / "out")
    with pytest.raises(FormatError, match=message):
        prune_model(Bundle(load_model(folder)), settings(ids, method))


@pytest.mark.parametrize(
    ("tensor", "linear"),
    [
        ("model.layers.1.post_attention_layernorm.weight", r"model\.layers\.1\.mlp\.gate_proj"),
        ("model.layers.2.input_layernorm.weight", r"model\.layers\.2\.self_attn\.q_proj"),
        ("model.embed_tokens.weight", r"model\.layers\.0\.self_attn\.q_proj"),
    ],
)
def test_activations_that_are_not_finite_name_the_linear(
    folder: Path, ids: str, tmp_path: Path, tensor: str, linear: str
) -> None:
    rewrite(folder, lambda tensors: tensors[tensor].fill_(float("nan")))
    with pytest.raises(CalibrationError, match=rf"^{linear}: input activations are not finite"):
        prune_folder(folder, settings(ids), tmp_path / "out")
    prune_folder(folder, settings(ids, "magnitude"), tmp_path / "other")  # which looks at none


def test_few_tokens_for_a_hessian_are_warned_of(llama: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", windows[:5].numpy())
    few, enough, unneeded = Run(), Run(), Run()
    prune_model(Bundle(copy.deepcopy(llama)), settings(str(tmp_path / "few.npy"), "sparsegpt"), few)
    assert few.warnings[0].startswith("80 tokens of calibration text are few for linears of 48 inputs")
    prune_model(Bundle(copy.deepcopy(llama)), settings(str(tmp_path / "few.npy"), "wanda"), unneeded)
    np.save(tmp_path / "enough.npy", windows.numpy())
    prune_model(Bundle(llama), settings(str(tmp_path / "enough.npy"), "sparsegpt"), enough)
    assert enough.warnings == unneeded.warnings == []


def test_what_a_solver_cannot_do_names_the_linear(
    llama: PreTrainedModel, ids: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.prune.sparsegpt import SparseGPT

    def fail(self: SparseGPT, *args: Any) -> None:
        raise CalibrationError("has no factor")

    monkeypatch.setattr(SparseGPT, "prune", fail)
    with pytest.raises(CalibrationError, match=r"^model\.layers\.0\.self_attn\.q_proj: has no factor$"):
        prune_model(Bundle(llama), settings(ids, "sparsegpt"))


def test_token_ids_of_another_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.full((2, 8), 64))
    with pytest.raises(CalibrationError, match="token id 64"):
        prune_folder(folder, settings(str(tmp_path / "ids.npy")), tmp_path / "out")


def test_tied_embeddings_stay_tied_and_dense(llama: PreTrainedModel, ids: str, tmp_path: Path) -> None:
    llama.config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(llama.config).eval()
    tied.save_pretrained(tmp_path / "dense")
    bundle, _ = prune_folder(tmp_path / "dense", settings(ids), tmp_path / "out")
    live = prune_model(Bundle(tied), settings(ids))
    assert live.masks.sha256() == bundle.masks.sha256()
    model = bundle.live()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out/model/model.safetensors")


def test_a_checkpoint_of_the_base_model_keeps_its_names(folder: Path, ids: str, tmp_path: Path) -> None:
    expected, _ = prune_folder(folder, settings(ids), tmp_path / "a")

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(folder, strip)
    found, _ = prune_folder(folder, settings(ids), tmp_path / "b")
    assert found.masks.sha256() == expected.masks.sha256()
    assert found.patterns == expected.patterns
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "b/model/model.safetensors")
    weights = found.live().state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.live().state_dict().items())
    assert open_bundle(str(tmp_path / "b")).masks.sha256() == expected.masks.sha256()
    assert all(row.sound and row.pattern == "2:4" for row in survey(Checkpoint(tmp_path / "b" / "model"))[1])


def test_sparse_linears_that_are_skipped_stay_as_they_were(folder: Path, ids: str, tmp_path: Path) -> None:
    first, _ = prune_folder(folder, settings(ids, pattern="4:8", skip=("*.mlp.*",)), tmp_path / "a")
    second, _ = prune_folder(tmp_path / "a", settings(ids, pattern="1:4", skip=("*.self_attn.*",)), tmp_path / "b")
    for name in all_linears(first.model):
        before = ".self_attn." in name
        assert second.patterns[name] == (NM(4, 8) if before else NM(1, 4))
        assert not before or torch.equal(second.masks[name], first.masks[name])
    assert all(row.sound for row in survey(Checkpoint(tmp_path / "b" / "model"))[1])
    live, before = Bundle(first.live(), masks=first.masks, patterns=first.patterns), first.masks.sha256()
    again = prune_model(live, settings(ids, pattern="1:4", skip=("*.self_attn.*",)))
    assert again.masks.sha256() == second.masks.sha256()
    assert dict(again.patterns) == dict(second.patterns)
    assert live.masks.sha256() == before  # a bundle's own masks are never changed


def test_a_skipped_linear_whose_mask_is_lost_is_found_before_the_walk(folder: Path, ids: str, tmp_path: Path) -> None:
    prune_folder(folder, settings(ids), tmp_path / "a")
    (tmp_path / "a" / "model" / "masks.safetensors").unlink()
    with pytest.raises(FormatError, match=r"says that model\.layers\.0\.mlp\.down_proj is sparse, but holds no mask"):
        prune_folder(tmp_path / "a", settings(ids, skip=("*.down_proj",)), tmp_path / "b", show=stop_after(0))
    prune_folder(tmp_path / "a", settings(ids), tmp_path / "c")


def test_a_packed_checkpoint_can_be_pruned_further(folder: Path, ids: str, tmp_path: Path) -> None:
    from compressllm.export.writer import export_model

    first, _ = prune_folder(folder, settings(ids), tmp_path / "a")
    export_model(Checkpoint(tmp_path / "a" / "model"), tmp_path / "packed", "packed")
    expected, _ = prune_folder(tmp_path / "a", settings(ids, pattern="1:4"), tmp_path / "b")
    found, _ = prune_folder(tmp_path / "packed", settings(ids, pattern="1:4"), tmp_path / "c")
    assert found.masks.sha256() == expected.masks.sha256() != first.masks.sha256()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.live().state_dict().items())


# --- interruption ---


class KilledError(Exception):
    """Stands for the end of the process."""


def stop_after(blocks: int) -> Callable[[Iterable[Any], int, str], Iterable[Any]]:
    def show(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
        for done, item in enumerate(items):
            if done == blocks:
                raise KilledError
            yield item

    return show


@pytest.mark.parametrize(("method", "order"), [("random", "parallel"), ("wanda", "parallel"), ("wanda", "sequential")])
@pytest.mark.parametrize("stops", [[0], [1], [2], [1, 1], [0, 2, 0]], ids=str)
def test_a_stopped_call_resumes_to_the_same_bytes(
    folder: Path, ids: str, tmp_path: Path, method: str, order: str, stops: list[int]
) -> None:
    config = settings(ids, method, pattern="0.5/row", skip=("*.1.mlp.*",), order=order)
    _, expected = prune_folder(folder, config, tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KilledError):
            prune_folder(folder, config, tmp_path / "stopped", show=stop_after(stop))
        assert not (tmp_path / "stopped" / "model").exists()
    _, run = prune_folder(folder, config, tmp_path / "stopped")
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
    assert run.records == expected.records
    assert run.metrics | {"resumed_at_block": None} == expected.metrics
    assert run.metrics["resumed_at_block"] == (sum(stops) or None)


@pytest.mark.parametrize("decoder", ["gpt2", "mixtral", "qwen2moe"], indirect=True)
def test_linears_in_other_forms_resume_to_the_same_bytes(decoder: PreTrainedModel, ids: str, tmp_path: Path) -> None:
    decoder.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    bundle, expected = prune_folder(tmp_path / "dense", settings(ids), tmp_path / "whole")
    with pytest.raises(KilledError):
        prune_folder(tmp_path / "dense", settings(ids), tmp_path / "stopped", show=stop_after(2))
    _, run = prune_folder(tmp_path / "dense", settings(ids), tmp_path / "stopped")
    assert run.metrics["resumed_at_block"] == 2
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
    assert run.records == expected.records
    assert [row["linear"] for row in run.records] == list(bundle.masks) == list(all_linears(decoder))


def test_masks_and_facts_go_by_the_checkpoints_names_of_experts(build_model, ids: str, tmp_path: Path) -> None:
    from transformers import MixtralConfig

    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    model = build_model(MixtralConfig(**size, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
    model.save_pretrained(tmp_path / "dense")
    bundle, run = prune_folder(tmp_path / "dense", settings(ids, skip=("*.experts.1.up_proj",)), tmp_path / "out")
    assert "model.layers.0.mlp.experts.1.up_proj" not in bundle.masks
    assert "model.layers.0.mlp.experts.1.gate_proj" in bundle.masks
    masks = load_file(tmp_path / "out/model/masks.safetensors")
    facts = json.loads((tmp_path / "out/model/compressllm.json").read_text())["linears"]
    assert masks.keys() == facts.keys()
    assert "model.layers.0.block_sparse_moe.experts.1.w1" in masks
    assert "model.layers.0.block_sparse_moe.experts.1.w3" not in masks
    assert facts["model.layers.0.block_sparse_moe.experts.1.w2"] == {"pattern": "2:4", "shape": [32, 16]}
    assert not any(".gate" in name and "gate_proj" not in name for name in masks)  # routers
    assert not any("fallback" in row for row in run.records if ".experts." not in row["linear"])
    assert all("fallback" in row for row in run.records if ".experts." in row["linear"])  # 112 tokens are few


def test_a_resumed_call_does_not_prune_finished_blocks_again(
    folder: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.prune.wanda import Wanda

    seen: list[Tensor] = []
    prune = Wanda.prune
    monkeypatch.setattr(Wanda, "prune", lambda self, weight, *rest: seen.append(weight) or prune(self, weight, *rest))
    with pytest.raises(KilledError):
        prune_folder(folder, settings(ids), tmp_path / "out", show=stop_after(2))
    assert len(seen) == 14
    prune_folder(folder, settings(ids), tmp_path / "out")
    assert len(seen) == 21


@pytest.mark.parametrize("write", range(3))
def test_a_block_that_is_written_but_not_noted_is_pruned_again(
    folder: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    prune_folder(folder, settings(ids), tmp_path / "whole")
    written = []

    def write_json(path: Path, value: Any) -> None:
        if len(written) == write:
            raise KilledError
        written.append(path)
        path.write_text(json.dumps(value))

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_json", write_json)
        with pytest.raises(KilledError):
            prune_folder(folder, settings(ids), tmp_path / "out")
    prune_folder(folder, settings(ids), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("victim", ["file_sha256", "bundle_of"])
def test_a_call_stopped_while_it_ends_resumes_to_the_same_bytes(
    folder: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    def stop(*args: Any) -> None:
        raise KilledError

    prune_folder(folder, settings(ids), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(record, victim, stop)  # before and after the folder is moved into place
        with pytest.raises(KilledError):
            prune_folder(folder, settings(ids), tmp_path / "out")
    assert (tmp_path / "out" / "model").exists() == (victim == "bundle_of")
    _, run = prune_folder(folder, settings(ids), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert run.metrics["resumed_at_block"] == 3


def test_a_finished_call_is_only_put_together_again(
    folder: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = prune_folder(folder, settings(ids), tmp_path / "out")
    before = hashes(tmp_path / "out")
    monkeypatch.setattr("compressllm.calibration.walker.embed_windows", stop_after(0))  # no forward is needed
    _, again = prune_folder(folder, settings(ids), tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    assert again.records == first.records


def test_a_result_that_was_taken_away_is_made_anew(folder: Path, ids: str, tmp_path: Path) -> None:
    prune_folder(folder, settings(ids), tmp_path / "out")
    before = hashes(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    with pytest.raises(KilledError):
        prune_folder(folder, settings(ids), tmp_path / "out", show=stop_after(0))
    prune_folder(folder, settings(ids), tmp_path / "out")
    assert hashes(tmp_path / "out") == before


def test_another_model_in_the_folder_is_left_alone(folder: Path, ids: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out" / "model")
    with pytest.raises(RunError, match="model: exists already; give a new folder"):
        prune_folder(folder, settings(ids), tmp_path / "out")
    assert file_sha256(tmp_path / "out/model/model.safetensors") == file_sha256(folder / "model.safetensors")


def touch(folder: Path) -> None:
    stamp = (folder / "model.safetensors").stat().st_mtime + 10
    os.utime(folder / "model.safetensors", (stamp, stamp))


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pattern": ({"pattern": "4:8"}, {}, "settings"),
    "skip": ({"skip": ("*.o_proj",)}, {}, "settings"),
    "method": ({"method": "random"}, {}, "settings, calibration text"),
    "dtype": ({"dtype": "bfloat16"}, {}, "settings, dtype"),
    "seed": ({}, {"seed": 1}, "seed"),
}


@pytest.mark.parametrize(("config", "run", "changed"), CHANGES.values(), ids=CHANGES.keys())
def test_a_call_does_not_resume_with_other_settings(
    folder: Path, ids: str, tmp_path: Path, config: dict[str, Any], run: dict[str, Any], changed: str
) -> None:
    with pytest.raises(KilledError):
        prune_folder(folder, settings(ids), tmp_path / "out", show=stop_after(2))
    before = file_sha256(tmp_path / "out" / "progress.json")
    with pytest.raises(RunError, match=f"was begun with another {changed}; restore it, or start again"):
        prune_folder(folder, settings(**{"ids": ids} | config), tmp_path / "out", **run)
    assert file_sha256(tmp_path / "out" / "progress.json") == before
    prune_folder(folder, settings(ids), tmp_path / "out")


def test_a_call_does_not_resume_on_another_model_or_text(folder: Path, ids: str, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        prune_folder(folder, settings(ids), tmp_path / "out", show=stop_after(2))
    np.save(ids, np.load(ids)[:, ::-1])
    with pytest.raises(RunError, match="was begun with another calibration text;"):
        prune_folder(folder, settings(ids), tmp_path / "out")
    np.save(ids, np.load(ids)[:, ::-1])
    touch(folder)
    with pytest.raises(RunError, match="was begun with another source;"):
        prune_folder(folder, settings(ids), tmp_path / "out")


SCRIPT = """
import sys, time
from pathlib import Path
from compressllm.core.run import Run
from compressllm.models.bundle import open_bundle
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model

def wait_in_the_last_block(items, total, label):
    for item in items:
        yield item
        if item.index == 1:
            next(iter(items))
            print("here", flush=True)
            time.sleep(60)

calibration = {"source": sys.argv[2]}
config = PruneConfig(
    method=sys.argv[4], calibration=calibration, dtype="float32", order=sys.argv[5], reconstruct=sys.argv[6] == "True"
)
prune_model(open_bundle(sys.argv[1]), config, Run(folder=Path(sys.argv[3]), show=wait_in_the_last_block))
"""


@pytest.mark.parametrize(
    ("method", "order", "reconstruct"),
    [
        ("wanda", "parallel", False),
        ("sparsegpt", "parallel", False),
        ("sparsegpt", "sequential", False),
        ("admm", "sequential", True),
    ],
)
def test_a_killed_process_resumes_to_the_same_bytes(
    folder: Path, ids: str, tmp_path: Path, method: str, order: str, reconstruct: bool
) -> None:
    config = settings(ids, method, order=order, reconstruct=reconstruct)
    prune_folder(folder, config, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), ids, str(tmp_path / "out"), method, order, str(reconstruct)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out" / "model").exists()
    _, run = prune_folder(folder, config, tmp_path / "out")
    assert run.metrics["resumed_at_block"] == 2
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
