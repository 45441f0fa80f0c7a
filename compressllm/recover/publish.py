"""The result of training: checked linear by linear, then put in place as a checkpoint or into the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from compressllm.core.atomic import put_in_place
from compressllm.core.errors import TrainingError
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import SparsityPattern
from compressllm.core.ranks import Ranks
from compressllm.models.bundle import Bundle, bundle_of
from compressllm.models.checkpoint import MASKS_NAME, Checkpoint, write_masks
from compressllm.models.linears import PrunableLinear, held_otherwise
from compressllm.models.record import finish_sparse_folder
from compressllm.models.shards import ShardWriter
from compressllm.models.tensornames import tensor_names
from compressllm.recover.held import Held

#: Parameter name -> its whole trained value, or None if it was not trained; all processes call it in the same order.
Trained = Callable[[str], Tensor | None]


def publish(bundle: Bundle, folder: Path, held: Held, masks: MaskStore, trained: Trained, ranks: Ranks) -> Bundle:
    """Write the trained checkpoint to ``folder / "model"``, which appears only once it is whole and sound.

    Weights are rounded to the dtypes they are stored in. What was not trained is copied.

    Raises: TrainingError if a linear breaks its pattern or its mask, or is not finite.
    """
    if bundle.checkpoint is None:
        raise TypeError("needs a bundle whose weights are in a checkpoint")
    source, work, final = bundle.checkpoint, folder / "model.partial", folder / "model"
    names, special = tensor_names(bundle.model, source), held_otherwise(bundle.model)
    sparse = {f"{name}.weight": name for name in held.linears}
    first = ranks.rank == 0
    if first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    out = ShardWriter(work, source.specs) if first else None
    tied: Mapping[str, str] = bundle.model.all_tied_weights_keys
    last: tuple[str, Tensor | None] = ("", None)
    for name, stored in names.items():
        linear = special.get(name)
        parameter = linear.parameter if linear else name
        if last[0] != parameter:  # experts of one tensor come one after the other
            value = trained(parameter)
            last = parameter, trained(tied[parameter]) if value is None and parameter in tied else value
        if out is None:
            continue
        value = last[1]
        if value is not None and linear is not None and linear.expert is not None:
            value = value[linear.expert, linear.rows[0] : linear.rows[1]]
        value = source.read(stored) if value is None else value.to("cpu", source.specs[stored].dtype).contiguous()
        if name in sparse:
            check_linear(sparse[name], held.linears[sparse[name]].turned(value), masks, held.patterns)
        out.write(stored, value)
    if out is not None:
        for stored in source.specs.keys() - set(names.values()):  # what the model does not read
            out.write(stored, source.read(stored))
        _finish(bundle, work, names, held, masks, out)
        shutil.rmtree(final, ignore_errors=True)
        put_in_place(work, final)
    ranks.exchange(None)
    return bundle_of(Checkpoint(final), bundle.tokenizer, bundle.model)


def put_back_(bundle: Bundle, held: Held, masks: MaskStore, trained: Trained) -> Bundle:
    """Put trained values into a model that holds its weights itself, and check them."""
    for name, parameter in bundle.model.named_parameters():
        value = trained(name)
        if value is not None:
            parameter.data.copy_(value)
        parameter.requires_grad_(False)
    for name, linear in held.linears.items():
        check_linear(name, linear.weight.cpu(), masks, held.patterns)
    return replace(bundle, masks=masks, patterns=dict(held.patterns))


def check_linear(name: str, weight: Tensor, masks: MaskStore, patterns: Mapping[str, SparsityPattern]) -> None:
    """Check an (out, in) weight against its mask and pattern. Raises TrainingError."""
    nonzero = weight != 0
    wrong = {
        "weights outside the mask": int((nonzero & ~masks[name]).count_nonzero()),
        f"groups that break {patterns[name]}": patterns[name].violations(nonzero),
        "weights that are not finite": int((~weight.isfinite()).count_nonzero()),
    }
    if found := [f"{count} {what}" for what, count in wrong.items() if count]:
        raise TrainingError(f"{name}: training left {', '.join(found)}; this is a bug, nothing was published")


def _finish(
    bundle: Bundle, work: Path, names: Mapping[str, str], held: Held, masks: MaskStore, out: ShardWriter
) -> None:
    if bundle.checkpoint is None:
        raise TypeError("needs a bundle whose weights are in a checkpoint")
    out.finish()
    stored = {name: names[f"{name}.weight"].removesuffix(".weight") for name in held.linears}
    kept = MaskStore({stored[name]: masks.packed(name) for name in held.linears})
    if kept:
        write_masks(work / MASKS_NAME, kept)
    linears: dict[str, PrunableLinear] = {stored[name]: linear for name, linear in held.linears.items()}
    patterns = {stored[name]: held.patterns[name] for name in held.linears}
    finish_sparse_folder(work, bundle.checkpoint, linears, kept, patterns)
