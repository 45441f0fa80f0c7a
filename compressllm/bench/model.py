"""Whole models: tokens a second, dense and on every backend asked for, held against each other in one process."""

from __future__ import annotations

import functools
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compressllm.bench.bandwidth import streaming_read
from compressllm.core.compute import choose_device
from compressllm.core.errors import RecipeError
from compressllm.eval.config import EvalConfig
from compressllm.eval.decoding import Decoder
from compressllm.kernels.linear import Choice
from compressllm.kernels.native.llama import llama_step
from compressllm.kernels.timing import in_rounds, ratio, seconds_of, spread
from compressllm.models.bundle import Bundle
from compressllm.stages.environment import PeakMemory, resident_bytes
from compressllm.stages.evaluate import prepare_linears

STEPS = ("native", "transformers", "compiled")
_DENSE = "dense"
_BITS = {"": None, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class ModelBench:
    """What to measure.

    Args:
        backends: Each is held against dense. After a colon it may have the bits that sparse linears are rounded to as
            they are read, to see what that is worth: ``native:int4``.
        batches: Sequences at a time.
        prompt: Tokens of a prompt; random ids, since speed does not depend on them.
        tokens: Tokens decoded in a turn, after the prompt, one at a time.
        seconds: For each batch; three rounds are made whatever they take.
        steps: How tokens are decoded, of `STEPS`, each for every backend: ``native`` in one call of C where the model
            allows it, and by transformers where not; ``compiled`` by torch.compile.
    """

    backends: Sequence[str] = ("auto",)
    batches: Sequence[int] = (1,)
    prompt: int = 128
    tokens: int = 32
    seconds: float = 20.0
    steps: Sequence[str] = ("native",)

    def __post_init__(self) -> None:
        for step in self.steps:
            if step not in STEPS:
                raise RecipeError(f"unknown step {step!r}; known: {', '.join(STEPS)}")
        if min(*self.batches, self.prompt, self.tokens) < 1:
            raise RecipeError(
                f"batches {self.batches}, prompt {self.prompt}, tokens {self.tokens}: all must be 1 or more"
            )


@dataclass(frozen=True)
class _Loaded:
    model: PreTrainedModel
    choices: Mapping[str, Choice]
    peak: int


def bench_model(bundle: Bundle, bench: ModelBench, config: EvalConfig) -> dict[str, Any]:
    """Prompt and decoding speed of the model, dense and on each backend, in rounds that take turns.

    All of them are in memory at once. Ratios are medians of the ratios within a round, to the dense model decoding in
    the same way, or by transformers if that is a way it does not have.

    Args:
        config: Dtype, device and `keep_dense`; its backend is not looked at.

    Raises: BackendUnavailableError; UnsupportedModelError.
    """
    device = choose_device(config.device)
    names = [_DENSE, *(name for name in bench.backends if name != _DENSE)]
    loaded = {name: _load(bundle, config, name, device) for name in names}
    rate = streaming_read(device)
    rows = [row for batch in bench.batches for row in _rows(loaded, batch, bench, device)]
    rate = max(rate, streaming_read(device))
    for row in rows:
        row["bandwidth_share"] = row["bytes_per_step"] / row["seconds_per_step"]["median"] / rate
    return {
        "rows": rows,
        "read_bytes_per_second": rate,
        "dtype": str(loaded[_DENSE].model.dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "prompt": bench.prompt,
        "tokens": bench.tokens,
        "steps": list(bench.steps),
        "backends": {name: _chosen(one) for name, one in loaded.items()},
    }


def backend_of(name: str) -> tuple[str, int | None]:
    """``native:int4`` -> ``native`` and 4. Raises RecipeError for other bits than 8 and 4."""
    backend, _, form = name.partition(":")
    if form not in _BITS:
        raise RecipeError(f"cannot read {name!r}; after the backend give :int8 or :int4, or nothing")
    return backend, _BITS[form]


def _load(bundle: Bundle, config: EvalConfig, name: str, device: torch.device) -> _Loaded:
    backend, bits = backend_of(name)
    config = config.model_copy(update={"backend": backend})
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model, choices = prepare_linears(bundle, config, bits)
        return _Loaded(model, choices, torch.cuda.max_memory_allocated(device) - before)
    before, peak = resident_bytes(), PeakMemory()
    model, choices = prepare_linears(bundle, config, bits)
    return _Loaded(model, choices, peak.bytes() - before)


def _rows(loaded: Mapping[str, _Loaded], batch: int, bench: ModelBench, device: torch.device) -> list[dict[str, Any]]:
    vocabulary = next(iter(loaded.values())).model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, bench.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    length = bench.prompt + bench.tokens
    turns: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {}
    for way, (name, one) in itertools.product(bench.steps, loaded.items()):
        native = llama_step if way == "native" else None
        decoder = Decoder(one.model, length, way == "compiled", native)
        turn = functools.partial(_turn, decoder, ids, bench.tokens, device)
        turn()  # compiles, measures, fills caches
        turns.setdefault((name, decoder.kind), turn)
    times = in_rounds(turns, bench.seconds)
    rows = []
    for (name, kind), found in times.items():
        (prompt, step), one = zip(*found, strict=True), loaded[name]
        dense = times.get((_DENSE, kind)) or times[_DENSE, "transformers"]  # no dense model has a native step
        dense_prompt, dense_step = zip(*dense, strict=True)
        rows.append(
            {
                "backend": name,
                "batch": batch,
                "step": kind,
                "prefill_tokens_per_second": batch * bench.prompt / spread(prompt)["median"],
                "decode_tokens_per_second": batch / spread(step)["median"],
                "prefill_speedup": ratio(prompt, to=dense_prompt),
                "decode_speedup": ratio(step, to=dense_step),
                "seconds_per_prompt": spread(prompt),
                "seconds_per_step": spread(step),
                "bytes_per_step": read_bytes(one.model),
                "weight_bytes": held_bytes(one.model),
                "load_peak_bytes": one.peak,
            }
        )
    return rows


def _turn(decoder: Decoder, ids: torch.Tensor, tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the prompt, and of a step."""
    logits = []
    prompt = seconds_of(lambda: logits.append(decoder.prefill(ids)), device)
    following = [logits[0].argmax(-1, keepdim=True)]

    def step() -> None:
        following[0] = decoder.step(following[0]).argmax(-1, keepdim=True)

    return prompt, seconds_of(step, device, tokens)


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decoding step reads: all, but of an embedding that is not the output head a few rows."""
    table: torch.Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == table.data_ptr()
    dense: int = sum(m.dense.nbytes for m in model.modules() if getattr(m, "dense_from", None))  # kept for prompts
    return held_bytes(model) - dense - (0 if tied else int(table.nbytes))


def _chosen(one: _Loaded) -> dict[str, Any]:
    refused = {name: reason for choice in one.choices.values() for name, reason in choice.refused.items()}
    return {"linears": dict(Counter(choice.name for choice in one.choices.values())), "refused": refused}
