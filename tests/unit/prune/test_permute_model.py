import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from compressllm.core.difference import relative_difference
from compressllm.core.errors import FormatError, RunError, UnsupportedModelError
from compressllm.core.pattern import NM
from compressllm.core.run import Run
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.channels import Channels, Found, find_channels
from compressllm.models.shards import file_sha256
from compressllm.prune import permute, sameness
from compressllm.prune.config import PermuteConfig, PruneConfig
from compressllm.prune.fold import Folds
from compressllm.prune.model import prune_model
from compressllm.prune.permute import permute_model


def settings(ids: str, **more: Any) -> PermuteConfig:
    return PermuteConfig(**{"calibration": {"source": ids}, "dtype": "float32", "rounds": 3} | more)


def permute_folder(folder: Path, config: PermuteConfig, into: Path, **run: Any) -> tuple[Bundle, Run]:
    into.mkdir(exist_ok=True)
    made = Run(folder=into, **run)
    return permute_model(open_bundle(str(folder)), config, made), made


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    return model(windows).logits


def test_live_and_streamed_agree_and_compute_the_same_for_every_architecture(
    decoder: PreTrainedModel, windows: Tensor, ids: str, tmp_path: Path
) -> None:
    if any(linear.form for linear in all_linears(decoder).values()):  # transposed, or an expert's
        with pytest.raises(UnsupportedModelError, match="out of scope"):
            permute_model(Bundle(decoder), settings(ids))
        return
    decoder.save_pretrained(tmp_path / "dense")
    before, run = logits(decoder, windows), Run()
    live = permute_model(Bundle(decoder), settings(ids), run)
    streamed, other = permute_folder(tmp_path / "dense", settings(ids), tmp_path / "out")
    weights = streamed.live().state_dict()
    assert live.model is decoder
    assert all(torch.equal(weights[name], tensor) for name, tensor in decoder.state_dict().items())
    assert run.records == other.records
    assert {row["scope"] for row in run.records} == {"mlp", "attention", "residual"}
    assert all(row["retained_before"] < row["retained_after"] < 1 + 1e-6 for row in run.records)
    assert 0 < other.metrics["largest_difference"] == run.metrics["largest_difference"] <= 1e-5
    assert relative_difference(logits(decoder, windows), before) <= 1e-5
    assert not other.warnings


def test_tied_embedding_in_bfloat16(build_model: Callable, windows: Tensor, ids: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    build_model(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    bundle, _ = permute_folder(tmp_path / "dense", settings(ids), tmp_path / "out")
    one = open_bundle(str(tmp_path / "dense")).live(torch.float32)
    other = bundle.live(torch.float32)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert relative_difference(logits(other, windows), logits(one, windows)) <= 1e-5
    assert bundle.stored_dtype == torch.bfloat16


def test_retained_score_is_that_of_the_papers_criterion(
    llama: PreTrainedModel, windows: Tensor, ids: str, folder: Path, tmp_path: Path
) -> None:
    inputs: list[Tensor] = []
    down = llama.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits(llama, windows)
    handle.remove()
    score = (down.weight.abs() * inputs[0].flatten(0, 1).square().mean(0).sqrt()).detach()
    bundle, run = permute_folder(folder, settings(ids), tmp_path / "out")
    (row,) = (row for row in run.records if row["permutation"] == "model.layers.1.mlp.down_proj")
    order = load_file(tmp_path / "out/permutations.safetensors")[row["permutation"]][0].long()
    for name, matrix in (("retained_before", score), ("retained_after", score[:, order])):
        kept = matrix.view(matrix.shape[0], -1, 4).topk(2).values.sum() / matrix.sum()
        assert row[name] == pytest.approx(float(kept), rel=1e-5)
    assert torch.equal(bundle.live().model.layers[1].mlp.down_proj.weight[:, :], permuted_down(llama, order, tmp_path))


def permuted_down(llama: PreTrainedModel, order: Tensor, tmp_path: Path) -> Tensor:
    stream = load_file(tmp_path / "out/permutations.safetensors")["residual"][0].long()
    return llama.model.layers[1].mlp.down_proj.weight[stream][:, order]


def test_pruning_afterwards_keeps_more(ids: str, folder: Path, tmp_path: Path) -> None:
    bundle, _ = permute_folder(folder, settings(ids, rounds=20), tmp_path / "out")
    prune = PruneConfig(pattern="2:4", calibration={"source": ids}, dtype="float32")
    errors = []
    for name, source in (("plain", open_bundle(str(folder))), ("permuted", bundle)):
        (tmp_path / name).mkdir()
        run = Run(folder=tmp_path / name)
        pruned = prune_model(source, prune, run)
        errors.append(sum(row["error"] for row in run.records))
        assert all(NM(2, 4).violations(pruned.masks[linear]) == 0 for linear in pruned.masks)
    assert errors[1] < 0.97 * errors[0]
    facts = json.loads((tmp_path / "permuted/model/compressllm.json").read_text())
    assert facts["source"]["permutations_sha256"] == file_sha256(tmp_path / "out/permutations.safetensors")


def test_anybody_can_check_the_permutations(folder: Path, ids: str, tmp_path: Path) -> None:
    bundle, run = permute_folder(folder, settings(ids), tmp_path / "out")
    model = tmp_path / "out/model"
    orders = {name: order.long() for name, order in load_file(model / "permutations.safetensors").items()}
    before, after = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
    folds = Folds(find_channels(bundle.model, ("mlp", "attention", "residual"), NM(2, 4)).channels, orders)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(folds.undo(name, after[name]), tensor)
    digest = file_sha256(model / "permutations.safetensors")
    facts = json.loads((model / "compressllm.json").read_text())
    assert facts["source"] == {"folder": "dense", "permutations_sha256": digest}
    assert facts["sha256"]["permutations.safetensors"] == digest == run.metrics["permutations_sha256"]
    assert not list((tmp_path / "out").glob("*.partial"))


def test_same_seed_same_bytes_another_seed_others(folder: Path, ids: str, tmp_path: Path) -> None:
    config = settings(ids, scope=("mlp",), score="magnitude")
    hashes = [
        permute_folder(folder, config, tmp_path / str(number), seed=seed)[1].metrics["permutations_sha256"]
        for number, seed in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_scope_and_a_sample_of_the_rows(llama: PreTrainedModel, ids: str) -> None:
    weights = copy.deepcopy(llama.state_dict())
    run = Run()
    permute_model(Bundle(llama), settings(ids, scope=("residual",), rows=100), run)
    (row,) = run.records
    assert row["permutation"] == "residual"
    assert row["rows_available"] == 3 * (32 + 16 + 16 + 48 + 48)
    assert 80 <= row["rows"] <= 100
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(llama.state_dict()[down].sort(dim=0).values, weights[down].sort(dim=0).values)
    assert not torch.equal(llama.state_dict()[down], weights[down])


def test_a_fold_that_changes_the_result_is_found_and_taken_back(
    llama: PreTrainedModel, ids: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(model: PreTrainedModel, scope: Any, pattern: NM) -> Found:
        found = find_channels(model, scope, pattern)
        channels = [
            Channels(one.name, one.scope, one.sets, one.size, one.readers, one.others[:-1])
            if one.name == "model.layers.1.mlp.down_proj"
            else one
            for one in found.channels
        ]
        return Found(channels, found.left)

    monkeypatch.setattr(permute, "find_channels", forgetful)
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: .*something else"):
        permute_model(Bundle(llama), settings(ids))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: .*something else"):
        permute_folder(folder, settings(ids), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_every_end_of_the_residual_stream_is_compared(llama: PreTrainedModel, windows: Tensor, lost: str) -> None:
    (stream,) = find_channels(llama, ("residual",), NM(2, 4)).channels
    folds = Folds([stream], {"residual": torch.arange(31, -1, -1)[None]})
    state = llama.state_dict()

    def after(name: str) -> Tensor:
        return state[name] if name == lost else folds.apply(name, state[name])

    with pytest.raises(UnsupportedModelError, match="the embedding" if "embed" in lost else "the output head"):
        sameness.measure_difference(llama, set(state), state.__getitem__, after, folds.stream, windows[:1])


def test_what_cannot_be_permuted_is_refused(llama: PreTrainedModel, ids: str, folder: Path, tmp_path: Path) -> None:
    permute_folder(folder, settings(ids, scope=("mlp",)), tmp_path / "out")
    with pytest.raises(RunError, match="exists already"):
        permute_folder(folder, settings(ids, scope=("mlp",)), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=r"no attention channels can be reordered.*8 channels are no"):
        permute_model(Bundle(llama), settings(ids, pattern="8:16"))
    pruned = prune_model(Bundle(llama), PruneConfig(method="magnitude"))
    with pytest.raises(FormatError, match="pruned already"):
        permute_model(pruned, settings(ids))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.down_proj\.weight: .*not finite"):
        permute_folder(folder, settings(ids, score="magnitude"), tmp_path / "other")


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"pattern": "0.5"}, {"scope": ()}, {"scope": ("heads",)}, {"score": "wnada"}, {"rounds": -1}):
        with pytest.raises(ValidationError):
            PermuteConfig(**wrong)
