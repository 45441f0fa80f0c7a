"""Quantisation-aware training: the forward is rounded, masks stay, and rtn makes of the result what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from compressllm.core.pattern import NM
from compressllm.core.quantized import round_to_nearest
from compressllm.core.run import Run
from compressllm.core.scheme import parse_scheme
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import open_bundle
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.model import quantize_model
from compressllm.recover import trainee
from compressllm.recover.config import RecoverConfig
from compressllm.recover.masking import MaskedWeight
from compressllm.recover.model import recover_model
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.rounded import Rounded

SCHEME = "int4-g32"


@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_moves_the_weights_behind_the_rounded_ones(transposed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    keep = NM(2, 4).keep(weight.abs())
    weight.masked_fill_(~keep, 0.0)
    turned = weight.T.contiguous() if transposed else weight.clone()
    parameter = turned.clone()
    mask = MaskedWeight(keep.T.contiguous() if transposed else keep, NM(2, 4), transposed)
    masking = Rounded({"w": mask}, parse_scheme(SCHEME), {"w": torch.bfloat16})
    optimizer = Optimizer({"w": parameter}, masking, (0.9, 0.95), 0.0)

    def expected(behind: torch.Tensor) -> torch.Tensor:
        plain = (behind.T if transposed else behind).bfloat16()
        made = round_to_nearest(plain, keep, parse_scheme(SCHEME)).dequantize(torch.float32)
        return made.T if transposed else made

    assert torch.equal(parameter, expected(turned))
    for _ in range(3):
        gradient = {"w": torch.randn_like(parameter)}
        masking.clean_(gradient)
        before = optimizer.weights["w"].clone()
        optimizer.step_(gradient, 1e-3)
        assert not torch.equal(optimizer.weights["w"], before)
        assert torch.equal(parameter, expected(optimizer.weights["w"]))
        assert not parameter[~mask.keep].any()
        assert not optimizer.weights["w"][~mask.keep].any()


@pytest.fixture
def settings(llama: PreTrainedModel, tmp_path: Path) -> Callable[..., RecoverConfig]:
    llama.save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(5)).numpy()
    np.save(tmp_path / "ids.npy", ids)
    base = {
        "teacher": str(tmp_path / "dense"), "data": (str(tmp_path / "ids.npy"),), "seqlen": 16, "held_out": 0.2,
        "max_tokens": 8 * 64, "batch_tokens": 64, "lr": 2e-3, "evaluate_every": 0.5, "quantize": SCHEME,
        "dtype": "float32",
    }  # fmt: skip
    return lambda **changes: RecoverConfig(**{**base, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rtn_makes_of_the_result_what_was_trained(
    llama: PreTrainedModel,
    member: Any,
    settings: Callable[..., RecoverConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    student = member("student", llama.to(dtype), 0)
    last: dict[str, torch.Tensor] = {}
    finish_ = trainee.Trainee.finish_

    def watched(self: trainee.Trainee, optimizer: Optimizer) -> Any:
        last.update({name: linear.weight.clone() for name, linear in all_linears(self.model).items()})
        return finish_(self, optimizer)

    monkeypatch.setattr(trainee.Trainee, "finish_", watched)
    (tmp_path / "out").mkdir()
    before = open_bundle(str(student))
    made = recover_model(before, settings(), Run(folder=tmp_path / "out"))
    assert made.masks.sha256() == before.masks.sha256()
    (tmp_path / "rtn").mkdir()
    config = QuantizeConfig(method="rtn", scheme=SCHEME)
    stored = quantize_model(made, config, Run(folder=tmp_path / "rtn")).quantized()
    assert len(stored) == len(last) == 21
    for name, weight in last.items():
        assert torch.equal(stored[name].read().dequantize(torch.float32), weight.float()), name
        assert not weight[~before.masks[name]].any()


def test_it_learns_what_rounding_took(
    llama: PreTrainedModel, member: Any, settings: Callable[..., RecoverConfig], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    run = Run(folder=tmp_path / "out")
    recover_model(open_bundle(str(member("student", llama, 0))), settings(max_tokens=40 * 64), run)
    held_out = run.metrics["held_out_perplexity"]
    assert held_out["after"] < held_out["before"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masking": "ast"}, "masks that stay"),
        ({"train": "masklora"}, "masks that stay"),
        ({"quantize": "int8-dynamic"}, "give it without -dynamic"),
        ({"quantize": "int5"}, "int4-g128"),
    ],
)
def test_what_does_not_go_together(
    settings: Callable[..., RecoverConfig], change: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)
