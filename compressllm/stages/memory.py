"""How much memory a stage will take, found out from shapes and settings before it begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from compressllm.calibration.config import CalibrationConfig
from compressllm.calibration.source import open_source
from compressllm.calibration.tokenids import TokenIds
from compressllm.calibration.windows import CALIBRATION_SAMPLES, CALIBRATION_SEQLEN, EVALUATION_SEQLEN
from compressllm.contextual.config import ContextualConfig
from compressllm.core.compute import choose_device, choose_dtype, training_dtype
from compressllm.core.config import Config
from compressllm.core.errors import RunError
from compressllm.core.memory import MemoryNeed, available_bytes, peak_of
from compressllm.core.pattern import NM
from compressllm.core.protocols import PRUNERS, QUANTIZERS
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.export.config import ExportConfig
from compressllm.models.bundle import Bundle
from compressllm.prune.config import PermuteConfig, PruneConfig
from compressllm.prune.exchange import SEARCHED_AT_ONCE
from compressllm.quantize.config import QuantizeConfig
from compressllm.recover.config import RecoverConfig
from compressllm.recover.gradients import fit_beside
from compressllm.stages.sizes import Sizes, sizes_of

_BATCH_TOKENS = 1024  # that walks and evaluations compute at once on each core
_LATE = 60_000_000  # modules that are imported when they are needed, and buffers of the threads
_LOSS_BUFFERS = 2 * (1 << 24)  # float32 logits of a chunk, and what is made of them, when perplexity is measured
_HEAD_BUFFERS = 4 * (1 << 25)  # one buffer of logits of a recovery's loss
_WALK = "lower calibration.samples or seqlen, or activation_memory_gb"
OVERRIDE = "COMPRESSLLM_MEMORY"


def _walk(
    sizes: Sizes, windows: tuple[int, int], limit_gb: float, hessian: bool, work: int, streams: int = 1
) -> dict[str, dict[str, int]]:
    """The phases of a walk over blocks.

    Args:
        windows: How many, of how many tokens; 0 if no text is looked at.
        hessian: Whether second moments are collected and factored.
        work: Bytes for every weight of a linear while it is solved.
        streams: Sets of hidden states kept.
    """
    count, seqlen = windows
    bytes_of_states = count * seqlen * sizes.hidden * sizes.computed
    states = streams * bytes_of_states if bytes_of_states <= limit_gb * 1e9 / streams else 0
    tokens = min(count * seqlen, sizes.threads * max(_BATCH_TOKENS, seqlen))
    block = {"block": sizes.block * sizes.both, "hidden states": states, "modules": _LATE}
    return {
        "embedding": {
            "embedding": sizes.outside * sizes.computed + sizes.copied(sizes.outside),
            "hidden states": states,
            "modules": _LATE,
        }
        if count
        else {},
        "forward": {
            **block,
            "activations": tokens * sizes.state * sizes.computed,
            "second moments": 4 * sizes.grams * hessian,
        },
        "solving": {
            **block,
            "second moments and factors": 4 * 3 * sizes.gram * hessian,
            "a linear's work": work * sizes.linear,
        },
        "the rest": {"largest tensor": sizes.largest * sizes.stored, "masks": sizes.sparse // 8, "modules": _LATE},
    }


def _windows(bundle: Bundle, calibration: CalibrationConfig) -> tuple[int, int]:
    source = open_source(calibration.source)
    if isinstance(source, TokenIds):
        count, seqlen = source.read().shape
        return min(count, calibration.samples or count), calibration.seqlen or seqlen
    seqlen = calibration.seqlen or min(CALIBRATION_SEQLEN, bundle.max_seqlen or CALIBRATION_SEQLEN)
    return calibration.samples or CALIBRATION_SAMPLES, seqlen


def _sizes(bundle: Bundle, config: Any) -> Sizes:
    device = choose_device(config.device)
    return sizes_of(bundle, choose_dtype(config.dtype, bundle.stored_dtype, device), device)


def _prune(bundle: Bundle, config: PruneConfig) -> MemoryNeed:
    sizes, pruner = _sizes(bundle, config), build(PRUNERS, config.method)
    windows = _windows(bundle, config.calibration) if pruner.needs or config.reconstruct else (0, 0)
    hessian = "hessian" in pruner.needs
    # The weight and what it becomes; scores, and what choosing by them takes: a fraction sorts, and counts in 64 bits.
    work = 20 if hessian or isinstance(config.pattern, NM) else 28
    if config.gather:  # what the search for an order holds, beside the scores; see `_permute`
        work = max(work, 12 + 5 * 4 + 5 * 4 * min(sizes.linear, SEARCHED_AT_ONCE) // max(1, sizes.linear))
    phases = _walk(sizes, windows, config.activation_memory_gb, hessian, work, 3 if config.reconstruct else 1)
    if config.order == "sequential":  # all windows wait within the block while a group of linears is solved
        within = windows[0] * windows[1] * sizes.state * sizes.computed
        phases["forward"]["activations"] = phases["solving"]["activations"] = within
    if config.reconstruct:
        # Weights, two moments, the sum of the gradients, and one more of these on each core.
        copies = 4 * sizes.block * (4 + sizes.threads)
        graph = sizes.threads * windows[1] * sizes.saved * 4
        phases["reconstruction"] = {**phases["solving"], "a linear's work": 0, "training": copies + graph}
        phases["reconstruction"]["second moments and factors"] = 0
    return peak_of(phases, _WALK)


def _permute(bundle: Bundle, config: PermuteConfig) -> MemoryNeed:
    sizes, criterion = _sizes(bundle, config), build(PRUNERS, config.score)
    windows = _windows(bundle, config.calibration) if criterion.needs else (0, 0)
    phases = _walk(sizes, windows, config.activation_memory_gb, False, 12)
    rows = 4 * config.rows * sizes.hidden * ("residual" in config.scope)
    searched = max(rows, 4 * sizes.linear)  # of the residual stream, or of a linear
    # Gathered, joined, channel by channel, and twice what each would add to its group; and a part of it worked on.
    phases["search"] = {**phases["solving"], "a linear's work": 0}
    phases["search"]["scores"] = 5 * searched + 5 * min(searched, 4 * SEARCHED_AT_ONCE)
    phases["solving"]["scores"] = rows
    # Before and after, in float32, with the head.
    phases["comparison"] = {"tensors before and after": 2 * 4 * sizes.largest + sizes.largest * sizes.stored}
    phases["comparison"]["modules"] = _LATE
    return peak_of(phases, _WALK)


def _quantize(bundle: Bundle, config: QuantizeConfig) -> MemoryNeed:
    sizes, hessian = _sizes(bundle, config), "hessian" in build(QUANTIZERS, config.method).needs
    windows = _windows(bundle, config.calibration) if hessian else (0, 0)
    phases = _walk(sizes, windows, config.activation_memory_gb, hessian, 24)
    return peak_of(phases, _WALK)


def _export(bundle: Bundle, config: ExportConfig) -> MemoryNeed:
    sizes = sizes_of(bundle, bundle.stored_dtype, torch.device("cpu"))
    common = {"masks": sizes.sparse // 8, "modules": _LATE}
    return peak_of(
        {
            "tensors": {"a tensor before and after": 2 * sizes.largest * sizes.stored, **common},
            "linears": {"a linear and its mask": sizes.linear * (3 * sizes.stored + 4), **common},
        },
        "nothing can be lowered: its largest tensor is held twice",
    )


def _evaluate(bundle: Bundle, config: EvalConfig) -> MemoryNeed:
    sizes = _sizes(bundle, config)
    seqlen = config.seqlen or min(EVALUATION_SEQLEN, bundle.max_seqlen or EVALUATION_SEQLEN)
    batch = max(1, _BATCH_TOKENS // seqlen)
    most = sizes.threads if config.windows is None else min(sizes.threads, -(-config.windows // batch))
    a_token = sizes.state * sizes.computed + sizes.vocabulary * sizes.computed
    model = {"model": sizes.parameters * sizes.computed, "modules": _LATE}
    return peak_of(
        {
            "loading": {**model, "a tensor as it is stored": sizes.copied(sizes.largest)},
            "forward": {**model, "activations and logits": most * (batch * seqlen * a_token + _LOSS_BUFFERS)},
        },
        "lower seqlen, compute with --dtype bfloat16, or set OMP_NUM_THREADS to compute fewer windows at once",
    )


def _contextual(bundle: Bundle, config: ContextualConfig) -> MemoryNeed:
    sizes = _sizes(bundle, config)
    tokens = max(config.seqlen, config.calibration.seqlen or 0) * sizes.threads
    a_token = (sizes.state + sizes.vocabulary) * sizes.computed
    return MemoryNeed(
        {"model": sizes.parameters * sizes.computed, "activations and logits": tokens * a_token, "modules": _LATE},
        "lower seqlen, or compute with --dtype bfloat16",
    )


def _recover(bundle: Bundle, config: RecoverConfig) -> MemoryNeed:
    device = choose_device(config.device)
    dtype = training_dtype(config.dtype, device)
    sizes = sizes_of(bundle, dtype, device)
    micro = -(-config.windows_per_step // config.micro_batch)
    trained = sizes.parameters if config.train == "all" else sizes.parameters // 50
    together = 1 < sizes.threads <= micro and fit_beside(sizes.computed * trained, sizes.threads + 1)
    passes = sizes.threads if together else 1
    tokens = passes * config.micro_batch * config.seqlen
    kept = sizes.hidden * sizes.blocks + sizes.saved if config.activation_checkpointing else sizes.saved * sizes.blocks
    teacher = bool(config.teacher and config.teacher_cache is None)
    apart = 4 * trained if dtype != torch.float32 or config.masking == "ast" else 0
    return MemoryNeed(
        {
            "student": sizes.parameters * sizes.computed,
            "teacher": sizes.parameters * sizes.computed * teacher,
            "optimizer": 8 * trained + apart,
            "gradients": trained * (4 + sizes.computed * (passes if together else 0)),
            "activations": tokens * kept * sizes.computed,
            "logits": passes * (_HEAD_BUFFERS * (3 if teacher else 2) + 4 * sizes.vocabulary * sizes.hidden),
            "modules": _LATE,
        },
        "lower micro_batch or seqlen, train an adapter, or take activation_checkpointing or teacher_cache",
    )


_ESTIMATES: dict[str, Callable[[Bundle, Any], MemoryNeed]] = {
    "prune": _prune,
    "permute": _permute,
    "quantize": _quantize,
    "export": _export,
    "eval": _evaluate,
    "recover": _recover,
    "contextual": _contextual,
}


def estimate(stage: str, bundle: Bundle, config: Config) -> MemoryNeed:
    """What a stage takes at its peak on top of what the process has, of a model that is not in memory yet.

    That is on a CPU, and right to a quarter on the models it has been compared on.
    """
    return _ESTIMATES[stage](bundle, config)


def check_memory(stage: str, need: MemoryNeed, config: Any, run: Run) -> None:
    """Refuse a stage that the machine has no memory for, and warn of one that it hardly has.

    Raises: RunError that says what takes the memory and what to lower.
    """
    on_cpu = choose_device(getattr(config, "device", "cpu")).type == "cpu"
    left = available_bytes()
    if left is None or not on_cpu or need.bytes <= 0.8 * left:
        return
    message = f"{stage}: needs about {need.bytes / 1e9:.1f} GB of memory, {left / 1e9:.1f} GB are left ({need})"
    if need.bytes <= left or os.environ.get(OVERRIDE) == "0":
        run.warn(f"{message}; {need.lower}")
        return
    raise RunError(f"{message}; {need.lower}, or set {OVERRIDE}=0 to try all the same")
