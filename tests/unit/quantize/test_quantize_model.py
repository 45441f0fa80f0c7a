import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from compressllm.core.errors import FormatError, RecipeError, RunError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM
from compressllm.core.protocols import QUANTIZERS
from compressllm.core.quantized import round_to_nearest
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.core.scheme import parse_scheme
from compressllm.core.stats import InputStats
from compressllm.eval.config import EvalConfig
from compressllm.export.hf import PackedConfig  # registers our loader
from compressllm.export.sizes import exported_sizes
from compressllm.export.writer import export_model
from compressllm.kernels.linear import SparseLinear
from compressllm.models import journal
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model
from compressllm.models.shards import file_sha256
from compressllm.models.survey import damaged_files, survey
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.model import quantize_model
from compressllm.stages.evaluate import prepare_linears

SIZE = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "gpt2": GPT2Config(**SIZE, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64),
    "mixtral": MixtralConfig(
        **SIZE,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}
FILES = ("model.packed.safetensors", "compressllm.json", "config.json")


class KilledError(Exception):
    """Stands for a kill."""


def quantize(folder: Path, into: Path, ids: str | None = None, **settings: Any) -> tuple[Bundle, Run]:
    into.mkdir(exist_ok=True)
    if ids:
        settings["calibration"] = {"source": ids}
    run = Run(folder=into)
    return quantize_model(open_bundle(str(folder)), QuantizeConfig(**{"dtype": "float32", **settings}), run), run


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "fp8"])
def test_rtn_rounds_every_linear_and_keeps_masks_and_the_rest(sparse: Path, tmp_path: Path, scheme: str) -> None:
    made, run = quantize(sparse, tmp_path / "out", method="rtn", scheme=scheme)
    before, after, masks = open_bundle(str(sparse)), made.checkpoint, made.masks
    assert after is not None
    assert before.checkpoint is not None
    linears = all_linears(made.model)
    assert len(linears) == 21 == len(made.quantized())
    assert before.checkpoint.specs.keys() == after.specs.keys()
    for name, spec in before.checkpoint.specs.items():
        plain, owner = before.checkpoint.read(name), name.removesuffix(".weight")
        assert after.specs[name] == spec
        if owner not in linears:
            assert torch.equal(raw(after.read(name)), raw(plain))
            continue
        keep = torch.ones_like(plain).bool() if owner.endswith("o_proj") else before.masks[owner]
        expected = round_to_nearest(plain, keep, parse_scheme(scheme))
        stored = after.quantized(owner)
        assert torch.equal(masks[owner], keep)
        assert torch.equal(raw(stored.codes), raw(expected.codes))
        assert torch.equal(stored.scales, expected.scales)
        assert torch.equal(raw(after.read(name)), raw(expected.dequantize()))
    assert run.metrics["linears"] == len(run.records) == 21
    assert damaged_files(after) == []
    rows = list(survey(after)[1])
    assert all(row.sound and row.scheme == scheme for row in rows)
    assert {row.pattern for row in rows} == {"2:4", "0.0"}
    sizes = exported_sizes(after)
    assert sizes.ratio < {"int8": 0.45, "fp8": 0.45, "int4-g32": 0.35}[scheme]  # tiny rows, and o_proj is dense


def note(inputs: dict[str, list[Tensor]], name: str, module: torch.nn.Module, args: tuple[Tensor]) -> None:
    inputs.setdefault(name, []).append(args[0])


def slowly(folder: Path, ids: str, scheme: str) -> dict[str, Tensor]:
    """GPTQ over whole forwards of a live model, one linear at a time; name -> the weight left."""
    model = load_model(folder, torch.float32)
    masks, windows = Checkpoint(folder).masks(), torch.from_numpy(np.load(ids))
    for block in model.model.layers:
        inputs: dict[str, list[Tensor]] = {}
        named = {name: module for name, module in all_linears(model).items() if module.module in set(block.modules())}
        hooks = [linear.module.register_forward_pre_hook(partial(note, inputs, name)) for name, linear in named.items()]
        with torch.no_grad():
            model(windows)
        for hook in hooks:
            hook.remove()
        for name, linear in named.items():
            x = torch.cat(inputs[name]).flatten(0, 1).float()
            stats = InputStats(tokens=len(x), hessian=x.T @ x / len(x))
            keep = masks[name] if name in masks else torch.ones_like(linear.weight).bool()
            made = build(QUANTIZERS, "gptq").quantize(linear.weight, keep, stats, parse_scheme(scheme))
            linear.weight.copy_(made.weight.dequantize(torch.float32).bfloat16())
    return {name: linear.weight for name, linear in all_linears(model).items()}


def test_each_block_is_calibrated_on_the_quantised_blocks_before_it(sparse: Path, ids: str, tmp_path: Path) -> None:
    made, run = quantize(sparse, tmp_path / "out", ids, scheme="int4-g32")
    expected = slowly(sparse, ids, "int4-g32")
    close = [
        torch.isclose(made.checkpoint.read(f"{name}.weight").float(), weight, atol=1e-6).float().mean()
        for name, weight in expected.items()
        if made.checkpoint
    ]
    assert len(close) == 21
    assert min(close) > 0.95  # a rounding that falls the other way moves what is behind it
    assert all(0 < row["error"] < 0.2 and row["tokens"] == 112 for row in run.records)


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_call_resumes_to_the_same_bytes(
    sparse: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    quantize(sparse, tmp_path / "whole", ids, scheme="int4-g32")
    written = []

    def write_json(path: Path, value: Any) -> None:
        if len(written) == killed:
            raise KilledError
        written.append(path)
        path.write_text(json.dumps(value))

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_json", write_json)
        with pytest.raises(KilledError):
            quantize(sparse, tmp_path / "out", ids, scheme="int4-g32")
    _, run = quantize(sparse, tmp_path / "out", ids, scheme="int4-g32")
    assert run.metrics["resumed_at_block"] == (killed or None)
    for name in FILES:
        assert file_sha256(tmp_path / "out" / "model" / name) == file_sha256(tmp_path / "whole" / "model" / name)


def test_another_scheme_does_not_go_on_where_one_was_killed(
    sparse: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("compressllm.models.quantizedrecord.file_sha256", stop)
        with pytest.raises(KilledError):
            quantize(sparse, tmp_path / "out", ids, scheme="int8")
    with pytest.raises(RunError, match="was begun with another settings"):
        quantize(sparse, tmp_path / "out", ids, scheme="fp8")


@pytest.mark.parametrize("backend", ["dense", "reference", "auto"])
def test_backends_run_the_stored_codes(sparse: Path, tmp_path: Path, windows: Tensor, backend: str) -> None:
    made, _ = quantize(sparse, tmp_path / "out", method="rtn", scheme="int4-g32")
    expected = made.live(torch.float32)
    for name, linear in all_linears(expected).items():
        linear.weight.copy_(made.quantized()[name].read().dequantize(torch.float32))  # not rounded to bfloat16
    model, choices = prepare_linears(made, EvalConfig(backend=backend, dtype="float32", device="cpu"))
    assert choices.keys() == all_linears(made.model).keys()
    swapped = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(swapped) == 21
    with torch.no_grad():
        found, wanted = model(windows).logits, expected(windows).logits
    assert (found - wanted).abs().max() < (1e-4 if backend != "auto" else 0.2)  # native rounds activations


def test_rounding_anew_is_refused_and_float8_runs_as_plain_weights(
    sparse: Path, tmp_path: Path, windows: Tensor
) -> None:
    made, _ = quantize(sparse, tmp_path / "int8", method="rtn", scheme="int8")
    config = EvalConfig(backend="reference", dtype="float32", device="cpu")
    with pytest.raises(FormatError, match="quantised already"):
        prepare_linears(made, config, bits=4)
    with pytest.raises(FormatError, match="quantised already; start from"):
        quantize(tmp_path / "int8" / "model", tmp_path / "twice", method="rtn")
    made, _ = quantize(sparse, tmp_path / "fp8", method="rtn", scheme="fp8")
    model, _ = prepare_linears(made, config)
    with torch.no_grad():
        assert torch.allclose(model(windows).logits, made.live(torch.float32)(windows).logits, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int4-g64", "fp8"])
@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_transformers_loads_it(sparse: Path, tmp_path: Path, windows: Tensor, scheme: str, backend: str) -> None:
    made, _ = quantize(sparse, tmp_path / "out", method="rtn", scheme=scheme)
    folder = tmp_path / "out" / "model"
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)  # fails loudly without the variant
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        variant="packed",
        dtype=torch.float32,
        output_loading_info=True,
        quantization_config=PackedConfig(backend=backend),
    )
    assert not any(info.values())
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == (21 if backend == "reference" else 0)
    expected = made.live(torch.float32)
    for name, linear in all_linears(expected).items():
        linear.weight.copy_(made.quantized()[name].read().dequantize(torch.float32))
    with torch.no_grad():
        assert torch.allclose(model(windows).logits, expected(windows).logits, atol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_forms_of_linears(kind: str, build_model: Any, tmp_path: Path, windows: Tensor) -> None:
    folder = tmp_path / kind
    build_model(OTHERS[kind]).bfloat16().save_pretrained(folder)
    (tmp_path / "pruned").mkdir()
    prune_model(open_bundle(str(folder)), PruneConfig(method="magnitude"), Run(folder=tmp_path / "pruned"))
    made, _ = quantize(tmp_path / "pruned" / "model", tmp_path / "out", method="rtn", scheme="int8")
    assert all(row.sound for row in survey(made.checkpoint, NM(2, 4))[1])
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "model",
        variant="packed",
        dtype=torch.bfloat16,
        quantization_config=PackedConfig(backend="dense"),
    )
    plain = made.live(torch.bfloat16)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(raw(loaded.state_dict()[name]), raw(tensor)), name


def test_skipped_linears_stay_as_they_are_and_an_export_is_what_is_computed(
    sparse: Path, ids: str, tmp_path: Path
) -> None:
    made, _ = quantize(sparse, tmp_path / "out", ids, scheme="int8", skip=("*.down_proj", "*.o_proj"))
    assert made.checkpoint is not None
    before = Checkpoint(sparse)
    for part in ("mlp.down_proj", "self_attn.o_proj"):
        name = f"model.layers.1.{part}"
        assert name not in made.quantized()
        assert torch.equal(raw(made.checkpoint.read(f"{name}.weight")), raw(before.read(f"{name}.weight")))
    with pytest.raises(FormatError, match="packed already"):
        export_model(made.checkpoint, tmp_path / "packed", "packed")
    export_model(made.checkpoint, tmp_path / "dense", "dense")
    dense = Checkpoint(tmp_path / "dense")
    for name in before.specs:
        assert torch.equal(raw(dense.read(name)), raw(made.checkpoint.read(name)))


def test_zeros_without_masks_stay_zeros(sparse: Path, ids: str, tmp_path: Path) -> None:
    masked, _ = quantize(sparse, tmp_path / "masked", ids, scheme="int4-g32")
    for name in ("masks.safetensors", "compressllm.json"):  # as another library would have saved it
        (sparse / name).unlink()
    made, _ = quantize(sparse, tmp_path / "out", ids, scheme="int4-g32")
    assert len(made.masks) == 21
    for name in masked.masks:
        assert torch.equal(made.masks[name], masked.masks[name])
        assert torch.equal(made.quantized()[name].read().codes, masked.quantized()[name].read().codes)


def test_what_cannot_be_quantised_is_refused(sparse: Path, llama: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="writes a checkpoint"):
        quantize_model(Bundle(llama))
    with pytest.raises(RecipeError, match=r"skip: '\*\.no_proj' matches no linear"):
        quantize(sparse, tmp_path / "out", method="rtn", skip=("*.no_proj",))
