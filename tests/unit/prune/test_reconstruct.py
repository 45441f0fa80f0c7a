import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from compressllm.core.errors import UnsupportedModelError
from compressllm.core.masks import raw
from compressllm.core.run import Run
from compressllm.models.blocks import all_linears, find_blocks
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.loading import load_model
from compressllm.models.shards import file_sha256
from compressllm.prune.config import PruneConfig, ReconstructConfig
from compressllm.prune.model import prune_model
from compressllm.prune.reconstruct import find_attention, mean_errors

FILES = ("model.safetensors", "masks.safetensors", "compressllm.json")
QUICK = {"epochs": 2, "batch": 4, "learning_rate": 0.01}


def settings(ids: str, reconstruct: Any = QUICK, **more: Any) -> PruneConfig:
    fields = {"pattern": "2:4", "calibration": {"source": ids}, "dtype": "float32", "reconstruct": reconstruct}
    return PruneConfig(**fields | more)


def prune(model: PreTrainedModel, config: PruneConfig, seed: int = 0) -> tuple[Bundle, Run]:
    """A copy of the model pruned in memory, and what was said of it."""
    run = Run(seed=seed)
    return prune_model(Bundle(copy.deepcopy(model)), config, run), run


def prune_folder(folder: Path, config: PruneConfig, into: Path, **run: Any) -> tuple[Bundle, Run]:
    into.mkdir(exist_ok=True)
    made = Run(folder=into, **run)
    return prune_model(open_bundle(str(folder)), config, made), made


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    others = b.state_dict()
    return all(torch.equal(raw(tensor), raw(others[name])) for name, tensor in a.state_dict().items())


def block_outputs(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """What every block of a model puts out, (windows, seqlen, hidden), from plain forwards with gradients."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    handles = [module.register_forward_hook(note) for module in find_blocks(model).modules]
    model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def error_of(found: Tensor, target: Tensor, loss: str) -> Tensor:
    squared, energy = (found - target).square().sum(-1), target.square().sum(-1)
    if loss == "mse":
        return squared.sum() / energy.sum()
    return (squared / (energy + 1e-6 * energy.mean())).mean()


@pytest.mark.parametrize("loss", ["mse", "token"])
@pytest.mark.parametrize("norms", [False, True])
def test_it_is_adam_on_the_surviving_weights_towards_the_dense_outputs(
    llama: PreTrainedModel, windows: Tensor, ids: str, loss: str, norms: bool
) -> None:
    reconstruct = {"loss": loss, "norms": norms, "epochs": 3, "batch": 7, "learning_rate": 0.01, "warmup": 0.0}
    found, run = prune(llama, settings(ids, reconstruct, skip=("model.layers.[12].*", "*.k_proj")))
    slow, _ = prune(llama, settings(ids, None, skip=("model.layers.[12].*", "*.k_proj")))
    targets = block_outputs(llama, windows)[0].detach()
    trained = {
        name: parameter
        for name, parameter in slow.model.named_parameters()
        if name.removesuffix(".weight") in slow.masks
        or (norms and name.startswith("model.layers.0.") and parameter.dim() == 1)
    }
    groups = [{"params": [p], "lr": 0.01 * float(p.detach().square().mean().sqrt())} for p in trained.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    peaks = [group["lr"] for group in optimizer.param_groups]
    errors = []
    for step in range(3):
        error = error_of(block_outputs(slow.model, windows)[0], targets, loss)
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        for name, parameter in trained.items():
            if parameter.dim() == 2:
                assert parameter.grad is not None
                parameter.grad[~slow.masks[name.removesuffix(".weight")]] = 0.0
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.step()
    errors.append(float(error_of(block_outputs(slow.model, windows)[0], targets, loss).detach()))
    weights = found.model.state_dict()
    for name, tensor in slow.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5)
        assert (name in trained) == (not torch.equal(tensor, llama.state_dict()[name])), name
    for row in run.records:
        assert row["reconstruct_unit"] == "model.layers.0"
        assert row["reconstruct_before"] == pytest.approx(errors[0], rel=1e-4)
        assert row["reconstruct_after"] == pytest.approx(errors[-1], rel=1e-3)


@pytest.mark.parametrize("unit", ["block", "sublayer"])
@pytest.mark.parametrize("target", ["dense", "block"])
def test_the_outputs_come_nearer_and_what_is_pruned_stays_plus_zero(
    decoder: PreTrainedModel, windows: Tensor, ids: str, unit: str, target: str
) -> None:
    if any(linear.form for linear in all_linears(decoder).values()):  # transposed, or an expert's
        with pytest.raises(UnsupportedModelError, match="cannot be reconstructed"):
            prune(decoder, settings(ids, QUICK))
        return
    with torch.no_grad():
        dense = block_outputs(decoder, windows)
    plain, _ = prune(decoder, settings(ids, None))
    bundle, run = prune(decoder, settings(ids, QUICK | {"unit": unit, "target": target}))
    with torch.no_grad():
        before, after = block_outputs(plain.model, windows), block_outputs(bundle.model, windows)
    for was, now, wanted in zip(before, after, dense, strict=True):
        assert error_of(now, wanted, "token") < error_of(was, wanted, "token")
    assert not run.warnings
    for name, keep in bundle.masks.items():
        weight = bundle.model.get_parameter(f"{name}.weight").detach()
        assert not raw(weight)[~keep].any(), name  # no negative zero either
        assert not torch.equal(weight, plain.model.get_parameter(f"{name}.weight"))
    units = {row["reconstruct_unit"] for row in run.records}
    assert len(units) == (6 if unit == "sublayer" else 3)
    assert all(row["reconstruct_after"] < row["reconstruct_before"] for row in run.records)
    assert run.metrics["reconstruct"] == mean_errors(run.records)
    for parameter in bundle.model.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None


def test_only_pruned_linears_change_unless_norms_do(llama: PreTrainedModel, ids: str) -> None:
    def changed(**options: Any) -> set[str]:
        bundle, _ = prune(llama, settings(ids, QUICK | options, skip=("*.o_proj", "model.layers.0.*")))
        before = llama.state_dict()
        return {name for name, tensor in bundle.model.state_dict().items() if not torch.equal(tensor, before[name])}

    linears = changed()
    assert linears == {
        f"model.layers.{index}.{name}.weight"
        for index in (1, 2)
        for name in (
            *(f"self_attn.{one}_proj" for one in "qkv"),
            *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
        )
    }
    assert changed(norms=True) - linears == {
        f"model.layers.{index}.{name}.weight"
        for index in (1, 2)
        for name in ("input_layernorm", "post_attention_layernorm")
    }


def test_the_dense_target_repairs_what_went_wrong_before(llama: PreTrainedModel, ids: str) -> None:
    _, dense = prune(llama, settings(ids, QUICK))
    _, block = prune(llama, settings(ids, QUICK | {"target": "block"}))
    at = "model.layers.2"
    before = {
        name: next(row["reconstruct_before"] for row in run.records if row["reconstruct_unit"] == at)
        for name, run in {"dense": dense, "block": block}.items()
    }
    assert before["dense"] > 1.2 * before["block"]  # it counts the error of two blocks more


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_nothing_pruned_changes_nothing(llama: PreTrainedModel, ids: str, method: str) -> None:
    bundle, run = prune(llama, settings(ids, pattern="0.0/row", method=method))
    assert same_weights(bundle.model, llama)
    assert run.metrics["reconstruct"] == {"units": 0}
    assert not any(key.startswith("reconstruct") for row in run.records for key in row)


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_a_unit_that_is_no_better_keeps_its_weights_and_says_so(llama: PreTrainedModel, ids: str, rate: float) -> None:
    plain, _ = prune(llama, settings(ids, None))
    bundle, run = prune(llama, settings(ids, QUICK | {"learning_rate": rate, "norms": True}))
    assert same_weights(bundle.model, plain.model)
    assert [warning.split(": ")[0] for warning in run.warnings] == [f"model.layers.{i}" for i in range(3)]
    for row in run.records:
        assert "kept the weights it had" in row["reconstruct_fallback"]
        assert row["reconstruct_after"] == row["reconstruct_before"]


@pytest.mark.parametrize("options", [{}, {"unit": "sublayer", "norms": True}, {"target": "block"}], ids=str)
def test_live_and_streamed_are_the_same(
    tiny_llama_folder: Path, ids: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = settings(ids, QUICK | options, dtype="bfloat16")
    live, run = prune(load_model(tiny_llama_folder), config)
    streamed, streamed_run = prune_folder(tiny_llama_folder, config, tmp_path / "out")
    assert same_weights(live.model, streamed.live())
    assert streamed_run.records == run.records
    assert run.metrics["reconstruct"]["after"] < run.metrics["reconstruct"]["before"]


class KilledError(Exception):
    """Stands for the end of the process."""


def stop_after(blocks: int) -> Callable[[Iterable[Any], int, str], Iterable[Any]]:
    def show(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
        for done, item in enumerate(items):
            if done == blocks:
                raise KilledError
            yield item

    return show


@pytest.mark.parametrize("target", ["dense", "block"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_call_resumes_to_the_same_bytes(
    tiny_llama_folder: Path, ids: str, tmp_path: Path, target: str, stop: int
) -> None:
    config = settings(ids, QUICK | {"target": target, "unit": "sublayer", "norms": True})
    _, expected = prune_folder(tiny_llama_folder, config, tmp_path / "whole")
    with pytest.raises(KilledError):
        prune_folder(tiny_llama_folder, config, tmp_path / "stopped", show=stop_after(stop))
    _, run = prune_folder(tiny_llama_folder, config, tmp_path / "stopped")
    found, whole = ([file_sha256(tmp_path / out / "model" / name) for name in FILES] for out in ("stopped", "whole"))
    assert found == whole
    assert run.records == expected.records
    assert run.metrics == expected.metrics | {"resumed_at_block": stop}


def test_the_same_seed_gives_the_same_bits_and_another_others(llama: PreTrainedModel, ids: str) -> None:
    only_first = settings(ids, skip=("model.layers.[12].*",))  # later masks depend on what it put out
    one, again, other = (prune(llama, only_first, seed)[0] for seed in (0, 0, 1))
    assert same_weights(one.model, again.model)
    assert one.masks.sha256() == other.masks.sha256()
    assert not same_weights(one.model, other.model)


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_the_number_of_threads_changes_nothing(
    build_model: Callable[..., PreTrainedModel], tmp_path: Path, unit: str
) -> None:
    shape = {"hidden_size": 96, "intermediate_size": 352, "num_hidden_layers": 1, "num_attention_heads": 4}
    np.save(tmp_path / "ids.npy", torch.randint(3, 64, (6, 64), generator=torch.Generator().manual_seed(0)).numpy())
    model = build_model(LlamaConfig(vocab_size=64, pad_token_id=0, **shape))
    config = settings(str(tmp_path / "ids.npy"), QUICK | {"unit": unit, "norms": True})
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(prune(model, config)[0].model)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert same_weights(*found)


def test_bfloat16_products_come_near_too(llama: PreTrainedModel, ids: str) -> None:
    bundle, run = prune(llama, settings(ids, QUICK | {"dtype": "bfloat16", "unit": "sublayer"}))
    assert run.metrics["reconstruct"]["after"] < run.metrics["reconstruct"]["before"]
    assert bundle.model.dtype == torch.float32


def test_a_block_without_one_attention_is_refused() -> None:
    block = nn.ModuleDict({"mixer": nn.Linear(4, 4), "attention_norm": nn.LayerNorm(4)})
    with pytest.raises(UnsupportedModelError, match="found none; use unit: block"):
        find_attention(block)


def test_settings_may_be_a_switch() -> None:
    assert PruneConfig(reconstruct=True).reconstruct == ReconstructConfig()
    assert PruneConfig(reconstruct=False).reconstruct is PruneConfig().reconstruct is None
    again = PruneConfig(**PruneConfig(reconstruct={"epochs": 2, "betas": [0.8, 0.9]}).model_dump(mode="json"))
    assert again.reconstruct == ReconstructConfig(epochs=2, betas=(0.8, 0.9))
    for wrong in ({"epochs": 0}, {"unit": "linear"}, {"speed": 1}, {"betas": [0.9, 1.0]}, {"learning_rate": 0}):
        with pytest.raises(ValidationError):
            PruneConfig(reconstruct=wrong)
