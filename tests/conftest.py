"""Shared by all tests: tiny random models built from configs, one thread, no network."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["COMPRESSLLM_MEASURE"] = "0"  # no test depends on how fast this machine is

import faulthandler
import multiprocessing
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from compressllm.core.protocols import BACKENDS

torch.set_num_threads(1)  # tiny models run fastest so, and the machine is shared
logging.set_verbosity_error()
logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}

CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=5),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": lambda: PhiConfig(**SHAPE),
    "opt": lambda: OPTConfig(
        **{key: value for key, value in SHAPE.items() if key != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32
    ),
    "neox": lambda: GPTNeoXConfig(**SHAPE),
    "mixtral": lambda: MixtralConfig(**GROUPED | {"intermediate_size": 16}, num_local_experts=4, num_experts_per_tok=2),
    "qwen3moe": lambda: Qwen3MoeConfig(
        **GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2
    ),
    "qwen2moe": lambda: Qwen2MoeConfig(
        **GROUPED,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=5,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model; norms and biases are random too, so that a mix-up of them shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def plain_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backends that compute bit for bit what torch does, on any machine."""
    known = {name: BACKENDS.get(name) for name in ("dense", "reference")}
    assert set(BACKENDS.names()) >= known.keys()
    monkeypatch.setattr(BACKENDS, "_entries", known)


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    """Makes a random model of a config."""
    return random_model


@pytest.fixture(params=sorted(CONFIGS))
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny model of every supported architecture in turn, float32."""
    return random_model(CONFIGS[request.param]())


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny Llama of three blocks with grouped keys and an untied head, float32."""
    return random_model(CONFIGS["llama"]())


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """A tiny GPT-2, whose linears are Conv1D, float32."""
    return random_model(CONFIGS["gpt2"]())


@pytest.fixture
def tiny_llama_folder(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """The tiny Llama as a checkpoint folder in bfloat16, as transformers writes it; without a tokenizer."""
    folder = tmp_path / "tiny-llama"
    copy.deepcopy(llama).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def windows() -> torch.Tensor:
    """(7, 16) token ids of the tiny models."""
    return torch.randint(3, 64, (7, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def launch() -> Callable[..., list[Any]]:
    """``launch(work, 2)``: what ``work(rank)`` returned, or the error it raised, in each process of a launch.

    The processes are forked, so that they need not import everything again, and find what ``torchrun`` would have
    put into their environment. One that hangs, and would wait a day for the others, fails the test after
    ``seconds``; one that dies gives None.
    """

    def run(work: Callable[[int], Any], size: int = 2, seconds: float = 120) -> list[Any]:
        # Listening before there is anything to find, so that no other process can take the port.
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        context = multiprocessing.get_context("fork")
        processes, ends = [], []
        for rank in range(size):
            end, other = context.Pipe(duplex=False)
            process = context.Process(
                target=_launched, args=(work, rank, size, port, other, 0.9 * seconds), daemon=True
            )
            # Forked from a thread of its own: OpenMP's threads belong to the one that used them, and a child of it
            # would wait for threads that it does not have.
            starter = threading.Thread(target=process.start)
            starter.start()
            starter.join()
            other.close()
            processes.append(process)
            ends.append(end)
        # Its thread begins once all are forked: one that is forked while it holds a lock would wait for it for ever.
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30),
            master_listen_fd=listening.detach(),
        )  # fmt: skip
        deadline = time.monotonic() + seconds
        try:
            return [_outcome(end, deadline) for end in ends]
        finally:
            for process in processes:
                process.kill()
                process.join()
            del store

    return run


def _launched(work: Callable[[int], Any], rank: int, size: int, port: int, end: Connection, seconds: float) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)  # where it hangs, before it is killed
    try:
        result = work(rank)
    except Exception as error:
        traceback.print_exc()
        result = error
    end.send_bytes(pickle.dumps(result))


def _outcome(end: Connection, deadline: float) -> Any:
    assert end.poll(max(0.0, deadline - time.monotonic())), "a launched process hangs"
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        return None
