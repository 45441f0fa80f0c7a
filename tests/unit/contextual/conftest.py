"""Tiny random models whose text a sparse draft gets wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.contextual.attach import Contextual
from compressllm.contextual.calibrate import calibrate


@pytest.fixture
def ready() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Makes a model whose MLPs matter, without an end, in float64: many tokens at once round as one by one."""

    def make(model: PreTrainedModel) -> PreTrainedModel:
        model.generation_config.eos_token_id = None
        for name, parameter in model.named_parameters():
            if any(f".{one}.weight" in name for one in ("down_proj", "fc2", "dense_4h_to_h")):
                parameter.data.mul_(20)
        return model.double()

    return make


@pytest.fixture
def model(llama: PreTrainedModel, ready: Callable[[PreTrainedModel], PreTrainedModel]) -> PreTrainedModel:
    """A tiny Llama of that kind."""
    return ready(llama)


@pytest.fixture
def prompt() -> Tensor:
    """(1, 9) ids."""
    return torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def dense_text() -> Callable[..., list[int]]:
    """``dense_text(model, prompt, limit)``: what transformers' own greedy search adds."""

    def text(model: PreTrainedModel, prompt: Tensor, limit: int) -> list[int]:
        made = model.generate(prompt, max_new_tokens=limit, do_sample=False)
        return made[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]

    return text


@pytest.fixture
def attached(model: PreTrainedModel, windows: Tensor) -> Callable[..., Contextual]:
    """``attached(selector, density)``: the model with a selector, calibrated on random windows if it wants to be."""

    def attach(selector: Any, density: float = 0.5) -> Contextual:
        return Contextual(model, selector, density, calibrate(model, selector, windows))

    return attach
