"""The eval stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedModel

from compressllm.calibration.windows import Windows, evaluation_windows
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import FormatError
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.eval.harness import check_tasks, open_tasks
from compressllm.eval.parent import Answers, agreement, answers
from compressllm.eval.perplexity import perplexity
from compressllm.kernels.linear import Choice
from compressllm.kernels.measured import Timings, measuring
from compressllm.kernels.swapper import Swapper, swap_linears_
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.linears import held_otherwise

#: Of what `measure` returns; raised when a key changes its meaning or goes.
SCHEMA: Final = 1


def evaluate_stage(bundle: Bundle, config: EvalConfig, run: Run) -> Bundle:
    """Measure the bundle into ``run.metrics``; the bundle goes on unchanged."""
    run.metrics.update(measure(bundle, config, run))
    return bundle


def measure(bundle: Bundle, config: EvalConfig, run: Run) -> dict[str, Any]:
    """What was asked for: perplexity and its protocol, agreement with the parent, tasks.

    Raises: CalibrationError, FormatError, RecipeError, BackendUnavailableError.
    """
    check_tasks(config)
    tasks = open_tasks(config) if config.tasks else None
    windows = _windows(bundle, config) if config.text else None
    parent = _parent_answers(bundle, config, windows, run) if windows and config.parent else None
    model, backends = prepare(bundle, config)
    found: dict[str, Any] = {"schema": SCHEMA}
    if windows:
        found |= _measure_text(model, windows, run)
    found["backends"] = backends
    if windows and parent:
        found["agreement"] = {"parent": config.parent, **agreement(parent, answers(model, windows.ids, run.track))}
    if tasks:
        found["tasks"] = tasks.measure(model, bundle.tokenizer)
    return found


def _windows(bundle: Bundle, config: EvalConfig) -> Windows:
    return evaluation_windows(
        config.text or "",
        bundle.tokenizer,
        seqlen=config.seqlen,
        limit=config.windows,
        max_seqlen=bundle.max_seqlen,
        vocab_size=bundle.vocab_size,
    )


def _measure_text(model: PreTrainedModel, windows: Windows, run: Run) -> dict[str, Any]:
    result = perplexity(model, windows.ids, progress=run.track, warn=run.warn)
    return {
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "windows": result.windows,
        "seqlen": result.seqlen,
        "dtype": result.dtype,
        "source": windows.source,
        "ids_sha256": windows.sha256,
        "text_sha256": windows.text_sha256,
        "protocol": f"{windows.rule}; {result.protocol}",
        "window_nll": list(result.window_nll),
    }


def _parent_answers(bundle: Bundle, config: EvalConfig, windows: Windows, run: Run) -> Answers:
    """The dense parent's, which is out of memory again before the model is loaded."""
    dense = open_bundle(str(config.parent))
    if dense.vocab_size != bundle.vocab_size:
        raise FormatError(
            f"{config.parent}: has a vocabulary of {dense.vocab_size}, the model of {bundle.vocab_size}; "
            "give the model it was made from"
        )
    model, _ = prepare(dense, config)
    return answers(model, windows.ids, run.track)


def prepare(bundle: Bundle, config: EvalConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The bundle's model in memory, its sparse linears on the backend asked for; and what was chosen, and why.

    Raises: BackendUnavailableError if a backend asked for by name cannot run a linear.
    """
    model, choices = prepare_linears(bundle, config)
    refused = {name: reason for choice in choices.values() for name, reason in choice.refused.items()}
    return model, {"linears": dict(Counter(choice.name for choice in choices.values())), "refused": refused}


def prepare_linears(
    bundle: Bundle, config: EvalConfig, bits: int | None = None
) -> tuple[PreTrainedModel, Mapping[str, Choice]]:
    """As `prepare`, with what was chosen for each linear.

    Args:
        bits: Round the weights of sparse linears to 8 or 4 bits as they are read; only of a model in a checkpoint.

    A model that is read from a checkpoint is never in memory dense: each linear is packed as soon as it is read.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, bundle.stored_dtype, device)
    settings = _settings(bundle, config)
    if bits and settings["quantized"]:
        raise FormatError(f"the model is quantised already; name the backend alone, without {bits} bits")
    swapper = Swapper(**settings, bits=bits)
    if bundle.checkpoint is None:
        return bundle.model, swap_linears_(bundle.model, swapper)
    swapper.choose_ahead(_shapes(bundle), dtype, device)
    return bundle.live(dtype, device, swapper), swapper.choices


def choices_ahead(bundle: Bundle, config: EvalConfig) -> dict[str, Choice]:
    """What would be chosen for each kind of sparse linear, ``4096x4096 2:4``; no weight is read."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, bundle.stored_dtype, device)
    return Swapper(**_settings(bundle, config)).choose_ahead(_shapes(bundle), dtype, device)


def _settings(bundle: Bundle, config: EvalConfig) -> dict[str, Any]:
    other = {linear.name: linear.form for linear in held_otherwise(bundle.model).values() if linear.form}
    timings = Timings() if measuring() else None
    return {
        "masks": bundle.masks,
        "patterns": bundle.patterns,
        "backend": config.backend,
        "other": other,
        "timings": timings,
        "keep_dense": config.keep_dense,
        "quantized": bundle.quantized(),
    }


def _shapes(bundle: Bundle) -> dict[str, tuple[int, int]]:
    return {name: bundle.masks.packed(name).shape for name in bundle.masks}
