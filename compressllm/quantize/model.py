"""Quantise a model, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.walker import Block, WalkOptions, walk_blocks
from compressllm.calibration.windows import windows_for
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.detect import find_sparsity, pattern_of
from compressllm.core.errors import CalibrationError, FormatError, RecipeError, UnsupportedModelError
from compressllm.core.layererror import relative_error
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import QUANTIZERS, Quantized, Quantizer
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.core.scheme import Scheme, parse_scheme
from compressllm.core.stats import InputStats
from compressllm.models.blocks import all_linears, find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.journal import Rows
from compressllm.models.quantizedrecord import QuantizedRecord
from compressllm.models.tensornames import tensor_names
from compressllm.quantize.awq import AWQScale
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.folds import Folds


def quantize_model(bundle: Bundle, config: QuantizeConfig | None = None, run: Run | None = None) -> Bundle:
    """Quantise front to back, each block calibrated on what the quantised blocks before it put out.

    Sparse linears keep their masks (in a checkpoint that holds none, those whose zeros follow a pattern, see
    `find_sparsity`), pruned weights are exactly zero, and scales are those of kept weights. The result
    is a packed checkpoint, written block by block into ``run.folder``, from where a killed call resumes. The model is
    never in memory as a whole.

    Raises: FormatError if the bundle is not a checkpoint, is quantised already, or has weights that are not finite or
        not zero where its masks prune; RecipeError, CalibrationError, UnsupportedModelError; RunError if
        ``run.folder`` holds a call with other settings.
    """
    config, run = config or QuantizeConfig(), run or Run()
    if bundle.checkpoint is None or run.folder is None:
        raise FormatError("quantising writes a checkpoint from another: save the model, and give the run a folder")
    if bundle.quantized():
        raise FormatError(f"{bundle.checkpoint.folder}: is quantised already; start from what it was made from")
    bundle = _with_masks(bundle, run)
    quantizer, scheme = build(QUANTIZERS, config.method), parse_scheme(config.scheme)
    folds = None
    if isinstance(quantizer, AWQScale):
        if config.order == "sequential":
            raise RecipeError("order: awq-scale changes what linears are given before any is quantised; use parallel")
        folds = Folds(bundle.model)
    names = to_quantize(bundle.model, config.skip, scheme)
    windows = windows_for(bundle, config.calibration, run) if quantizer.needs else None
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, bundle.stored_dtype, device)
    fingerprint = {
        "settings": config.model_dump(mode="json"),
        "seed": run.seed,
        "calibration text": windows.sha256 if windows else None,
    }
    record = QuantizedRecord(bundle, names, config.scheme, run.folder, fingerprint, dtype, device)
    options = WalkOptions(
        device=device, memory_limit=int(config.activation_memory_gb * 1e9), spill_folder=run.folder, warn=run.warn
    )
    blocks = walk_blocks(bundle.model, windows.ids if windows else None, record.weights, options, start=record.done)
    for block in run.track(blocks, len(find_blocks(bundle.model).modules) - record.done, "quantising"):
        planned = [name for name in block.linears if name in names]
        rescale = None
        if folds is not None and isinstance(quantizer, AWQScale):
            rescale = partial(
                quantizer.rescale_, block, planned, folds, bundle.masks, scheme, record.order, record.weights
            )
        rows = _quantize_block(block, planned, bundle, quantizer, scheme, config.order, record, run, rescale)
        record.finish(block.name, rows)
    quantized = record.close()
    for row in record.rows:
        run.log(**row)
    run.metrics.update(
        linears=len(names),
        scheme=config.scheme,
        sparsity=quantized.masks.sparsity(),
        masks_sha256=quantized.masks.sha256(),
        mean_layer_error=sum(row["error"] for row in record.rows) / len(record.rows),
        calibration=windows.facts() if windows else None,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        resumed_at_block=record.done or None,
    )
    return quantized


def to_quantize(model: PreTrainedModel, skip: Sequence[str], scheme: Scheme) -> list[str]:
    """Names of the linears to quantise, front to back.

    Raises: RecipeError for a glob that matches nothing; UnsupportedModelError for a linear that cannot run the scheme.
    """
    linears = all_linears(model)
    names = list(linears)
    for glob in skip:
        if not any(fnmatchcase(name, glob) for name in names):
            raise RecipeError(f"skip: {glob!r} matches no linear; names look like {names[0]}")
    left = [name for name in names if not any(fnmatchcase(name, glob) for glob in skip)]
    if not left:
        raise RecipeError("skip: leaves no linear to quantise")
    if scheme.dynamic and (other := next((linears[name] for name in left if linears[name].form), None)):
        raise UnsupportedModelError(
            f"{other.name}: is {other.form}; {scheme} rounds the inputs of nn.Linears only, use "
            f"{replace(scheme, dynamic=False)}"
        )
    return left


def _with_masks(bundle: Bundle, run: Run) -> Bundle:
    """The bundle with a mask and a pattern of every sparse linear: of one without masks, read off the zeros."""
    if bundle.masks or bundle.checkpoint is None:
        known = {name: bundle.patterns.get(name) or pattern_of(bundle.masks[name]) for name in bundle.masks}
        return replace(bundle, patterns={**bundle.patterns, **known})
    linears, tensors = all_linears(bundle.model), tensor_names(bundle.model, bundle.checkpoint)
    masks, patterns = MaskStore(), dict[str, SparsityPattern]()
    for name, linear in run.track(linears.items(), len(linears), "looking for zeros"):
        weight = linear.turned(bundle.checkpoint.read(tensors[f"{name}.weight"])).contiguous()
        if found := find_sparsity(weight):
            patterns[name], masks[name] = found
    return replace(bundle, masks=masks, patterns=patterns)


def _quantize_block(
    block: Block,
    names: Sequence[str],
    bundle: Bundle,
    quantizer: Quantizer,
    scheme: Scheme,
    order: str,
    record: QuantizedRecord,
    run: Run,
    rescale: Callable[[dict[str, InputStats]], Mapping[str, Any]] | None,
) -> Rows:
    """Quantise the named linears of a block into the record; a row of facts for each.

    Args:
        rescale: Changes the block and its statistics first; gives what rows are to say of it.
    """
    weights, rows = record.weights, Rows()
    for name in names:
        if not weights.read(f"{name}.weight").isfinite().all():  # or the activations would be blamed
            raise FormatError(f"{name}.weight: holds values that are not finite")
    for stats in block.collect_in_turn(quantizer.needs) if order == "sequential" else (block.collect(quantizer.needs),):
        told = rescale(stats) if rescale else {}
        for name in [name for name in names if name in stats]:
            seen = stats.pop(name)
            weight = weights.read(f"{name}.weight").to(block.device, torch.float32)
            keep = bundle.masks[name].to(block.device) if name in bundle.masks else torch.ones_like(weight).bool()
            if lost := int(((weight != 0) & ~keep).count_nonzero()):
                raise FormatError(f"{name}: holds {lost} weights that are not zero where its mask prunes")
            made = _solved(name, weight, keep, seen, quantizer, scheme, record.order(name))
            rows.append({**_row(name, weight, made, seen), **told.get(name, {})})
            record.quantize_(name, made.weight)
            if fallback := rows[-1].get("fallback"):
                run.warn(f"{name}: {fallback}")
            del seen
        stats.clear()
    return rows


def _solved(
    name: str,
    weight: Tensor,
    keep: Tensor,
    stats: InputStats,
    quantizer: Quantizer,
    scheme: Scheme,
    order: Tensor | None,
) -> Quantized:
    try:
        with torch.inference_mode():
            if order is None:
                return quantizer.quantize(weight, keep, stats, scheme)
            order = order.to(weight.device)
            made = quantizer.quantize(weight[:, order], keep[:, order], stats.in_order(order), scheme)
            return replace(made, weight=made.weight.placed(order))
    except (CalibrationError, FormatError) as error:  # methods do not know whose weight they have
        raise type(error)(f"{name}: {error}") from None


def _row(name: str, weight: Tensor, made: Quantized, stats: InputStats) -> dict[str, Any]:
    fallback = "; ".join(reason for reason in (stats.pooled, made.fallback) if reason)
    return {
        "linear": name,
        "tokens": stats.tokens,
        "error": relative_error(weight, made.weight.dequantize(torch.float32), stats),
        **made.notes,
        **({"fallback": fallback} if fallback else {}),
    }
