"""The eval stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from compressllm.calibration.windows import evaluation_windows
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import FormatError
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.eval.perplexity import perplexity
from compressllm.kernels.linear import Choice
from compressllm.kernels.measured import Timings, measuring
from compressllm.kernels.swapper import Swapper, swap_linears_
from compressllm.models.bundle import Bundle
from compressllm.models.linears import held_otherwise


def evaluate_stage(bundle: Bundle, config: EvalConfig, run: Run) -> Bundle:
    """Measure the bundle's perplexity into ``run.metrics``; the bundle goes on unchanged."""
    run.metrics.update(measure(bundle, config, run))
    return bundle


def measure(bundle: Bundle, config: EvalConfig, run: Run) -> dict[str, Any]:
    """Perplexity and the protocol it was measured under.

    Raises: CalibrationError, FormatError, BackendUnavailableError.
    """
    windows = evaluation_windows(
        config.source,
        bundle.tokenizer,
        seqlen=config.seqlen,
        limit=config.windows,
        max_seqlen=bundle.max_seqlen,
        vocab_size=bundle.vocab_size,
    )
    model, backends = prepare(bundle, config)
    result = perplexity(model, windows.ids, progress=run.track)
    return {
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "windows": result.windows,
        "seqlen": result.seqlen,
        "dtype": result.dtype,
        "backends": backends,
        "source": windows.source,
        "ids_sha256": windows.sha256,
        "text_sha256": windows.text_sha256,
        "protocol": f"{windows.rule}; {result.protocol}",
        "window_nll": list(result.window_nll),
    }


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
