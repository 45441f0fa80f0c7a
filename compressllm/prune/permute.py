"""Reorder a model's channels so that an N:M pattern keeps more, and the model computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compressllm.calibration.walker import WalkOptions, walk_blocks
from compressllm.calibration.windows import Windows, windows_for
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import FormatError, RecipeError, UnsupportedModelError
from compressllm.core.parallel import map_batches
from compressllm.core.protocols import PRUNERS
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.channels import Channels, Found, find_channels
from compressllm.models.weights import Weights
from compressllm.prune.config import PermuteConfig
from compressllm.prune.criterion import Criterion
from compressllm.prune.exchange import Order, find_order
from compressllm.prune.fold import Folds
from compressllm.prune.refolded import LiveRefolded, Refolded, WrittenRefolded
from compressllm.prune.scores import ScoreRows

#: Tokens that the model is compared on before and after.
_COMPARED = 128


def permute_model(bundle: Bundle, config: PermuteConfig | None = None, run: Run | None = None) -> Bundle:
    """Reorder channels so that an N:M pattern keeps more of the score; what the model computes stays the same.

    One pass of the dense model scores all weights. The orders found are folded into the weights, so that nothing is
    left to do when the model runs, and then it is measured, block by block in float32, that it computes the same.

    A bundle that holds its weights itself is changed in place. One with a checkpoint is never in memory as a whole:
    the new checkpoint is written tensor by tensor into ``run.folder``. A killed call starts anew.

    Raises: UnsupportedModelError if ``scope`` names channels of which none can be reordered, or the model would
        compute something else; FormatError for a model that is pruned already, and for weights that are not finite;
        CalibrationError; RunError if ``run.folder`` holds a model already.
    """
    config, run = config or PermuteConfig(), run or Run()
    criterion = _criterion(config, run.seed)
    found = choose_channels(bundle, config)
    for message in _left_alone(found):
        run.warn(message)
    windows = windows_for(bundle, config.calibration, run) if criterion.needs else None
    device, dtype = _compute(bundle, config)
    refolded: Refolded = (
        LiveRefolded(bundle, run)
        if bundle.checkpoint is None
        else WrittenRefolded(bundle, bundle.checkpoint, run, dtype, device)
    )
    try:
        options = WalkOptions(
            device=device, memory_limit=int(config.activation_memory_gb * 1e9), spill_folder=run.folder, warn=run.warn
        )
        orders = _find_orders(bundle, config, run, criterion, found.channels, windows, refolded.weights, options)
        folds = Folds(found.channels, {name: order.places for name, order in orders.items()})
        ids = windows.ids[:1, :_COMPARED] if windows else _random_ids(bundle, run.seed)
        difference = refolded.fold_(folds, ids)
        permuted, sha256 = refolded.close()
    except BaseException:
        refolded.abandon_()
        raise
    run.metrics.update(
        permutations=len(orders),
        retained=_retained(found.channels, orders),
        largest_difference=difference,
        compared_tokens=ids.numel(),
        permutations_sha256=sha256,
        calibration=windows.facts() if windows else None,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
    )
    return permuted


def choose_channels(bundle: Bundle, config: PermuteConfig) -> Found:
    """The channels that would be reordered.

    Raises: FormatError for a model that is pruned already; UnsupportedModelError if none of a kind can be.
    """
    if bundle.patterns or bundle.masks:
        where = f"{bundle.checkpoint.folder}: " if bundle.checkpoint else ""
        raise FormatError(f"{where}is pruned already, and another order breaks its pattern; permute the dense model")
    found = find_channels(bundle.model, config.scope, config.pattern)
    for scope in config.scope:
        if not any(one.scope == scope for one in found.channels):
            raise UnsupportedModelError(
                f"{type(bundle.model).__name__}: no {scope} channels can be reordered: {found.left[scope][0]}; "
                f"leave {scope} out of scope"
            )
    return found


def _left_alone(found: Found) -> list[str]:
    """One line for each kind of channels that some were left alone of."""
    return [
        f"{len(reasons)} times {scope} channels keep their order, the first because: {reasons[0]}"
        for scope, reasons in found.left.items()
        if reasons
    ]


def _find_orders(
    bundle: Bundle,
    config: PermuteConfig,
    run: Run,
    criterion: Criterion,
    channels: Sequence[Channels],
    windows: Windows | None,
    weights: Weights,
    options: WalkOptions,
) -> dict[str, Order]:
    """Score the dense model block by block, and search an order of each channels as soon as all their scores are in."""
    gathering = {one.name: ScoreRows(one, bundle.model, config.rows, run.seed) for one in channels}
    readers = {slot.tensor: (one.name, slot) for one in channels for slot in one.readers}  # each linear reads one
    orders: dict[str, Order] = {}
    blocks = walk_blocks(bundle.model, windows.ids if windows else None, weights, options)
    for block in run.track(blocks, len(find_blocks(bundle.model).modules), "permuting"):
        stats = block.collect(criterion.needs)
        for linear in block.linears:
            tensor, seen = f"{linear}.weight", stats.pop(linear)
            if tensor in readers:
                name, slot = readers[tensor]
                with torch.inference_mode():
                    weight = weights.read(tensor).to(block.device, torch.float32)
                    gathering[name].add_(slot, criterion.score(weight, seen))
        complete = [rows for rows in gathering.values() if rows.complete]
        for rows, order in zip(complete, _search(complete, config, run.seed, block.device), strict=True):
            orders[rows.channels.name] = order
            _log(run, rows, order)
            del gathering[rows.channels.name]
    return {one.name: orders[one.name] for one in channels}


def _search(complete: Sequence[ScoreRows], config: PermuteConfig, seed: int, device: torch.device) -> Iterator[Order]:
    """An order of each channels. On a CPU each search has one core: its operators are too short to be split."""

    def search(index: int) -> Order:
        with torch.inference_mode():
            return find_order(complete[index].matrix(), config.pattern, config.rounds, seed)

    return map_batches(search, len(complete), device)


def _log(run: Run, rows: ScoreRows, order: Order) -> None:
    run.log(
        permutation=rows.channels.name,
        scope=rows.channels.scope,
        sets=rows.channels.sets,
        channels=rows.channels.size,
        rows=rows.kept,
        rows_available=rows.available,
        retained_before=order.before,
        retained_dealt=order.dealt,
        retained_after=order.after,
        rounds=order.rounds,
    )


def _retained(channels: Sequence[Channels], orders: dict[str, Order]) -> dict[str, Any]:
    """Scope -> how many orders, and the mean share of the score retained before and after."""
    table: dict[str, Any] = {}
    for scope in dict.fromkeys(one.scope for one in channels):
        own = [orders[one.name] for one in channels if one.scope == scope]
        table[scope] = {
            "permutations": len(own),
            "before": sum(order.before for order in own) / len(own),
            "after": sum(order.after for order in own) / len(own),
        }
    return table


def _criterion(config: PermuteConfig, seed: int) -> Criterion:
    criterion = build(PRUNERS, config.score, {"seed": seed})
    if not isinstance(criterion, Criterion):
        raise RecipeError(f"score: {config.score!r} does not score weights one by one; give magnitude, say, or wanda")
    return criterion


def _compute(bundle: Bundle, config: PermuteConfig) -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype blocks run; a model that holds its weights itself stays as it is."""
    if bundle.checkpoint is None:
        return bundle.model.device, bundle.stored_dtype
    device = choose_device(config.device)
    return device, choose_dtype(config.dtype, bundle.stored_dtype, device)


def _random_ids(bundle: Bundle, seed: int) -> Tensor:
    """(1, tokens) ids for a comparison, where no text is at hand."""
    length = min(_COMPARED, bundle.max_seqlen or _COMPARED)
    return torch.randint(bundle.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
