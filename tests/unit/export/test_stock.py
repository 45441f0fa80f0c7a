"""Exports for compressed-tensors, opened by the library itself through transformers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM
from compressllm.core.run import Run
from compressllm.core.scheme import parse_scheme
from compressllm.export.sizes import exported_sizes
from compressllm.export.writer import export_model
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.survey import damaged_files, survey
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.model import quantize_model

FORMAT = "compressed-tensors"
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="the package compressed-tensors is not installed"
)


@pytest.fixture
def pruned(build_model: Any, tmp_path: Path) -> Path:
    """A Llama of two blocks at 2:4, whose rows are multiples of 32."""
    model = build_model(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    model.bfloat16().save_pretrained(tmp_path / "dense")
    (tmp_path / "pruned").mkdir()
    config = PruneConfig(method="magnitude", pattern="2:4")
    prune_model(open_bundle(str(tmp_path / "dense")), config, Run(folder=tmp_path / "pruned"))
    return tmp_path / "pruned" / "model"


def quantized(folder: Path, into: Path, scheme: str, **settings: Any) -> Bundle:
    into.mkdir()
    config = QuantizeConfig(scheme=scheme, method="rtn", dtype="float32", **settings)
    return quantize_model(open_bundle(str(folder)), config, Run(folder=into))


@needs_library
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4-g32", "fp8", "fp8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_library_computes_what_the_dequantised_model_does(
    pruned: Path, tmp_path: Path, windows: Tensor, scheme: str, dtype: torch.dtype
) -> None:
    made = quantized(pruned, tmp_path / "made", scheme, skip=("*.1.self_attn.o_proj",))
    assert made.checkpoint is not None
    export_model(made.checkpoint, tmp_path / "out", FORMAT)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "sparsity_config" not in config
    assert config["ignore"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    expected, plain_model = made.live(dtype), made.live(dtype)
    for one in (expected, plain_model):
        for name, codes in made.quantized().items():  # in float32 not rounded to the stored bfloat16
            all_linears(one)[name].weight.copy_(codes.read().dequantize(dtype))
    if parse_scheme(scheme).dynamic:
        for name in made.quantized():
            linear = all_linears(expected)[name].module
            linear.register_forward_pre_hook(lambda module, args: (parse_scheme(scheme).round_tokens(args[0]),))
    with torch.no_grad():
        found, wanted = loaded(windows).logits, expected(windows).logits
        plain = plain_model(windows).logits
    if parse_scheme(scheme).dynamic:  # the library scales integers by 127.5 of the largest, and rounds in the dtype
        assert (found - wanted).abs().max() < 2 * (wanted - plain).abs().max()
        assert not torch.equal(found, plain)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4-g32", "fp8"])
def test_the_folder_holds_the_same_weights_and_verifies(pruned: Path, tmp_path: Path, scheme: str) -> None:
    made = quantized(pruned, tmp_path / "made", scheme)
    source = made.checkpoint
    assert source is not None
    export_model(source, tmp_path / "out", FORMAT)
    written = Checkpoint(tmp_path / "out")
    assert written.specs == source.specs
    for name in source.specs:
        assert torch.equal(raw(written.read(name)), raw(source.read(name) + 0.0)), name
    for name in written.facts.schemes if written.facts else ():
        assert torch.equal(written.quantized(name).codes.float(), source.quantized(name).codes.float())
    assert not (tmp_path / "out" / "masks.safetensors").exists()
    assert damaged_files(written) == []
    rows = list(survey(written, NM(2, 4))[1])
    assert len(rows) == 14
    assert all(row.sound and row.scheme == scheme for row in rows)
    bits = parse_scheme(scheme).bits
    assert bits / 16 < exported_sizes(written).ratio < bits / 16 + 0.25  # scales of tiny rows
    export_model(written, tmp_path / "plain", "dense")
    dense = Checkpoint(tmp_path / "plain")
    assert all(torch.equal(raw(dense.read(name)), raw(written.read(name))) for name in source.specs)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_what_it_cannot_hold_is_refused(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is not quantised; .* run `compressllm quantize` first"):
        export_model(Checkpoint(pruned), tmp_path / "out", FORMAT)
    made = quantized(pruned, tmp_path / "made", "int4-g64")
    assert made.checkpoint is not None
    with pytest.raises(FormatError, match=r"no multiple of 64, which compressed-tensors needs; quantise to int4-g32"):
        export_model(made.checkpoint, tmp_path / "out", FORMAT)
    assert not (tmp_path / "out").exists()
