"""Write a quantised checkpoint as compressed-tensors stores it, for the loaders that know that library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compressllm import __version__
from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.core.run import Track, untracked
from compressllm.core.scheme import Scheme, parse_scheme
from compressllm.core.stockcodes import FORMAT, pack_stock, stock_config, stock_layout, stock_refuses
from compressllm.export.modelcard import run_of, write_card
from compressllm.export.sizes import exported_sizes
from compressllm.export.whole import appears_whole
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import Facts
from compressllm.models.linears import held_otherwise
from compressllm.models.loading import skeleton
from compressllm.models.shards import MAX_SHARD_BYTES, ShardWriter, file_sha256
from compressllm.models.tensorfile import TensorSpec
from compressllm.models.tensornames import tensor_names


def export_stock(
    source: Checkpoint, out: Path, progress: Track = untracked, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Facts:
    """Write a quantised checkpoint to a new folder in the layout of compressed-tensors. Zeros are stored like the rest.

    The folder appears whole or not at all, and is read back before it does: codes and weights are those of the source
    to the bit, but that -0.0 becomes +0.0.

    Raises: FormatError if the source is not quantised, or in a way that the library cannot hold; or if ``out`` holds
        something, or what was read back differs.
    """
    scheme, ignore = _scheme(source), _not_quantised(source)
    quantised = {name: linear for name, linear in source.facts.linears.items() if linear.scheme} if source.facts else {}
    for name, linear in quantised.items():
        if reason := stock_refuses(scheme, linear.shape[1]):
            raise FormatError(f"{source.folder}: {name}: {reason}")
    with appears_whole(out) as work:
        facts = Facts(
            written_by=__version__,
            format=FORMAT,
            linears=source.facts.linears if source.facts else {},
            source=source.facts.source if source.facts else {},
        )
        facts.write(work)
        source.copy_side_files(work)
        config = json.loads((work / "config.json").read_text())
        config["quantization_config"] = stock_config(scheme, ignore)
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_tensors(
            source, work, {name: one.shape for name, one in quantised.items()}, scheme, max_shard_bytes, progress
        )
        written = Checkpoint(work)
        for name in progress(source.specs, len(source.specs), "comparing"):
            before = source.read(name)
            if not torch.equal(raw(_without_negative_zeros(before)), raw(_without_negative_zeros(written.read(name)))):
                raise FormatError(f"{work}: {name} reads back differently from the source; is the disk sound?")
        facts = facts.model_copy(update={"sha256": {path.name: file_sha256(path) for path in written.files}})
        write_card(work, facts, exported_sizes(written).ratio, run_of(source.folder))
        facts.write(work)
    return facts


def _scheme(source: Checkpoint) -> Scheme:
    names = set(source.facts.schemes.values()) if source.facts else set()
    if len(names) != 1:
        raise FormatError(
            f"{source.folder}: {'is quantised to several schemes' if names else 'is not quantised'}; {FORMAT} holds "
            "quantised weights: run `compressllm quantize` first"
        )
    return parse_scheme(names.pop())


def _not_quantised(source: Checkpoint) -> list[str]:
    """Paths of the linears that stay plain, the output head among them. Raises FormatError for other forms."""
    model = skeleton(source)
    schemes, stored = source.facts.schemes if source.facts else {}, tensor_names(model, source)
    for linear in held_otherwise(model).values():
        if stored[f"{linear.name}.weight"].removesuffix(".weight") in schemes:
            raise FormatError(f"{source.folder}: {linear.name} is {linear.form}; {FORMAT} holds nn.Linears only")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [n for n in linears if stored.get(f"{n}.weight", "").removesuffix(".weight") not in schemes]


def _write_tensors(
    source: Checkpoint,
    work: Path,
    shapes: Mapping[str, tuple[int, int]],
    scheme: Scheme,
    max_shard_bytes: int,
    progress: Track,
) -> None:
    layout: dict[str, TensorSpec] = {}
    owner = {f"{name}.weight": name for name in shapes}
    for name, spec in source.specs.items():
        if name in owner:
            parts = stock_layout(owner[name], spec.dtype, shapes[owner[name]], scheme)
            layout.update({part: TensorSpec(*each) for part, each in parts.items()})
        else:
            layout[name] = spec
    writer = ShardWriter(work, layout, None, max_shard_bytes)
    try:
        for name in progress(source.specs, len(source.specs), "writing"):
            if name in owner:
                for part, tensor in pack_stock(owner[name], source.quantized(owner[name])):
                    writer.write(part, tensor)
            else:
                writer.write(name, source.read(name))
        writer.finish()
    finally:
        writer.close()


def _without_negative_zeros(tensor: Tensor) -> Tensor:
    return tensor + 0.0 if tensor.is_floating_point() else tensor
