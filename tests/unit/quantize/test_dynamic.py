"""Schemes that round activations too, however the model is run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from compressllm.core.errors import UnsupportedModelError
from compressllm.core.pattern import NM
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import quantize_absmax
from compressllm.core.scheme import Scheme, parse_scheme
from compressllm.eval.config import EvalConfig
from compressllm.export.hf import PackedConfig
from compressllm.kernels.linear import SparseLinear
from compressllm.kernels.native.library import unavailable
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle
from compressllm.stages.evaluate import prepare_linears


def obvious(made: Bundle, scheme: Scheme) -> nn.Module:
    """The dequantised model, each linear of which rounds what it is given."""
    model = made.live(torch.float32)
    for name, linear in all_linears(model).items():
        linear.weight.copy_(made.quantized()[name].read().dequantize(torch.float32))
        linear.module.register_forward_pre_hook(lambda module, args: (scheme.round_tokens(args[0]),))
    return model


@pytest.mark.parametrize("name", ["int8-dynamic", "fp8-dynamic"])
def test_inputs_are_rounded_by_every_way_to_run_it(
    quantized: Callable[..., Any], tmp_path: Path, windows: Tensor, name: str
) -> None:
    made, _ = quantized(method="rtn", scheme=name)
    folder, scheme = tmp_path / "out" / "model", parse_scheme(name)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["scheme"] == name
    assert {str(one.scheme) for one in made.quantized().values()} == {name}
    ways = {
        backend: prepare_linears(made, EvalConfig(backend=backend, dtype="float32", device="cpu"))[0]
        for backend in ("dense", "reference", "auto")
    }
    for backend in ("dense", "reference"):
        ways[f"transformers {backend}"] = AutoModelForCausalLM.from_pretrained(
            folder, variant="packed", dtype=torch.float32, quantization_config=PackedConfig(backend=backend)
        )
    with torch.no_grad():
        plain = made.live(torch.float32)(windows).logits
        wanted = obvious(made, scheme)(windows).logits
        rounding = (wanted - plain).abs().max()
        assert rounding > 0
        for way, model in ways.items():
            swapped = [module for module in model.modules() if isinstance(module, SparseLinear)]
            assert len(swapped) == 21, way
            error = (model(windows).logits - wanted).abs().max()
            # native rounds 32 inputs by a scale, finer than asked for; the rest compute just this
            rounds_itself = any(module.backend == "native" for module in swapped)
            assert error < (2 * rounding if rounds_itself else 1e-4), way


def test_gradients_pass_through_the_rounding(quantized: Callable[..., Any]) -> None:
    made, _ = quantized(method="rtn", scheme="int8-dynamic")
    model, _ = prepare_linears(made, EvalConfig(backend="dense", dtype="float32", device="cpu"))
    linear = next(module for module in model.modules() if isinstance(module, SparseLinear))
    x = torch.randn(3, linear.in_features, requires_grad=True)
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(0).expand_as(x), atol=1e-5)


def test_linears_that_cannot_round_their_inputs_are_refused(
    quantized: Callable[..., Any], build_model: Any, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=2, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    build_model(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match=r"is a Conv1D.*int8-dynamic rounds the inputs .* use int8"):
        quantized(folder=tmp_path / "gpt2", method="rtn", scheme="int8-dynamic")


@pytest.mark.skipif(bool(unavailable()), reason=f"no native kernels: {unavailable()}")
def test_tokens_that_a_matrix_unit_takes_are_rounded_before() -> None:
    torch.manual_seed(0)
    keep = NM(2, 4).keep(torch.rand(32, 128))
    weight = quantize_absmax(torch.randn(32, 128).bfloat16().masked_fill(~keep, 0), keep, 8, 64)
    scheme = Scheme(8, 64, dynamic=True)
    native, exact = (
        SparseLinear(weight, keep, None, NM(2, 4), name, scheme=scheme) for name in ("native", "native-exact")
    )
    if BACKENDS.get("native")().rounds_up_to == math.inf:
        pytest.skip("this processor has no matrix unit, native rounds all inputs")
    x = torch.randn(40, 128).bfloat16()
    assert torch.equal(native(x), exact(x))
    few = native(x[:4]).float() - exact(x[:4]).float()
    assert 0 < few.norm() < 0.02 * exact(x[:4]).float().norm(), "rounded once, by the kernel"
