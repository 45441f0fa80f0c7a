"""The record of a walk that quantises: a packed checkpoint written block by block, from which it resumes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressllm import __version__
from compressllm.core.gathered import Gathered
from compressllm.core.masks import MaskStore
from compressllm.core.packedcodes import codes_layout, pack_codes, unpack_codes
from compressllm.core.pattern import SparsityPattern, Unstructured
from compressllm.core.protocols import FORMATS, Format
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.registry import build
from compressllm.core.scheme import Scheme, SchemeName, parse_scheme
from compressllm.core.stamp import stamp_config
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, bundle_of
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import Facts, LinearFacts
from compressllm.models.journal import Journal, Rows
from compressllm.models.linears import PrunableLinear
from compressllm.models.record import computed_on
from compressllm.models.shards import ShardWriter, file_sha256
from compressllm.models.tensorfile import TensorSpec
from compressllm.models.tensornames import tensor_names
from compressllm.models.weights import StreamedWeights

FORMAT = "packed"


class QuantizedRecord:
    """Codes go to a packed checkpoint folder; a killed walk resumes after its last finished block.

    Args:
        bundle: A bundle with a checkpoint, none of whose linears is quantised.
        names: The linears that the walk quantises. One without a mask keeps every weight, and sparse ones that are not
            among them are packed as they are.
        scheme: What they are rounded to.
        folder: Existing folder; the checkpoint appears in it as ``model`` when the walk is over.
        fingerprint: Everything the results depend on.

    Raises: RunError for a record with another fingerprint; FormatError for a mask that is missing; OSError if the disk
        is full.
    """

    def __init__(
        self,
        bundle: Bundle,
        names: Collection[str],
        scheme: SchemeName,
        folder: Path,
        fingerprint: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if bundle.checkpoint is None:
            raise TypeError("a QuantizedRecord needs a bundle whose weights are in a checkpoint")
        self._source, self._bundle, self._scheme = bundle.checkpoint, bundle, scheme
        bundle.check_masks()
        linears, tensors = all_linears(bundle.model), tensor_names(bundle.model, self._source)
        held = {n: one for n, one in linears.items() if n in names or n in bundle.masks}
        self._stored = {name: tensors[f"{name}.weight"].removesuffix(".weight") for name in held}
        self._masks, patterns = MaskStore(), dict[str, SparsityPattern]()
        self._orders: dict[str, Tensor] = {}
        for name, stored in self._stored.items():
            dense = name not in bundle.masks
            self._masks[stored] = torch.ones(held[name].shape, dtype=torch.bool) if dense else bundle.masks[name]
            patterns[stored] = pattern = Unstructured(0.0) if dense else bundle.patterns[name]
            grouped = name in names and parse_scheme(scheme).width(held[name].shape[1]) < held[name].shape[1]
            if grouped and isinstance(pattern, Gathered) and held[name].expert is None:
                self._orders[stored] = pattern.places
        self._facts = {
            stored: LinearFacts(
                pattern=patterns[stored],
                shape=held[name].shape,
                transposed=held[name].transposed,
                scheme=scheme if name in names else None,
            )
            for name, stored in self._stored.items()
        }
        self._journal = Journal(folder, {**fingerprint, **computed_on(self._source, dtype, device)})
        self.rows, self.done = self._journal.rows, len(self._journal.blocks)
        by_stored = {self._stored[name]: linear for name, linear in held.items()}
        quantized = {self._stored[name] for name in names}
        self._out = PackedShards(
            self._journal.work, self._source, self._masks, by_stored, quantized, parse_scheme(scheme), self._orders,
            bool(self.done),
        )  # fmt: skip
        self.weights = StreamedWeights(bundle.model, self._source, self._out, set(self._journal.blocks), dtype, device)

    def order(self, name: str) -> Tensor | None:
        """(in,) order of inputs that a linear's groups are to lie in: that of its pattern; None if as they come."""
        return self._orders.get(self._stored[name])

    def quantize_(self, name: str, weight: QuantizedWeight) -> None:
        """Write the codes of a linear of the loaded block, and give it the weight that they stand for."""
        self._out.write_codes(self._stored[name], weight)
        self.weights.replace_(f"{name}.weight", weight.dequantize(torch.float32))

    def finish(self, block: str, rows: Rows) -> None:
        """Write what else is in a loaded block, all of whose linears have their codes, and note that it is finished."""
        self.weights.finish_(block)
        self._journal.note(block, rows)

    def close(self) -> Bundle:
        """Copy everything outside the blocks, move the folder into place and open it."""
        self.weights.finish_rest_()
        self._out.finish()
        work = self._journal.work
        self._source.copy_side_files(work)
        facts = Facts(
            written_by=__version__,
            format=FORMAT,
            variant=FORMAT,
            linears=self._facts,
            masks_sha256=self._masks.sha256(),
            source={**self._source.origin, "folder": self._source.folder.name},
            sha256={path.name: file_sha256(path) for path in sorted(work.glob("*.safetensors"))},
        )
        stamp_config(work, facts.format, facts.version, facts.variant, self._scheme)
        facts.write(work)
        self._journal.finish()
        return bundle_of(Checkpoint(self._journal.final), self._bundle.tokenizer, self._bundle.model)


class PackedShards(ShardWriter):
    """Shards in which sparse linears are packed and some of them quantised, written and read as plain tensors.

    Args:
        source: What is written has its tensors.
        masks: Stored name -> mask, of the linears that are packed.
        linears: The same names -> linear.
        quantized: Those of them whose codes `write_codes` is given; their plain weights are not written.
        orders: The same names -> order of inputs, of the quantised whose groups lie in one.
        begun: As of `ShardWriter`.
    """

    def __init__(
        self,
        folder: Path,
        source: Checkpoint,
        masks: MaskStore,
        linears: Mapping[str, PrunableLinear],
        quantized: set[str],
        scheme: Scheme,
        orders: Mapping[str, Tensor],
        begun: bool,
    ) -> None:
        self._packed: Format = build(FORMATS, FORMAT)
        self._masks, self._linears, self._quantized, self._orders = masks, linears, quantized, orders
        self._dtypes = {name: source.specs[f"{name}.weight"].dtype for name in linears}
        layout: dict[str, TensorSpec] = {}
        for name, spec in source.specs.items():
            owner = self._owner(name)
            if owner is None:
                layout[name] = spec
                continue
            if owner in quantized:
                parts = codes_layout(owner, spec.dtype, masks[owner], scheme, owner in orders)
            else:
                parts = self._packed.layout(owner, spec.dtype, masks[owner])
            layout.update({part: TensorSpec(*each) for part, each in parts.items()})
        super().__init__(folder, layout, FORMAT, begun=begun)

    def write_codes(self, owner: str, weight: QuantizedWeight) -> None:
        """Write the codes and scales of a linear."""
        keep = self._masks[owner]
        for part, tensor in pack_codes(owner, weight.to(torch.device("cpu")).to(self._dtypes[owner]), keep):
            super().write(part, tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor as it is stored; nothing for a quantised linear's weight, which its codes stand for."""
        owner = self._owner(name)
        if owner is None:
            super().write(name, tensor)
        elif owner not in self._quantized:
            weight = self._linears[owner].turned(tensor).contiguous()
            for part, each in self._packed.pack(owner, weight, self._masks[owner]):
                super().write(part, each)

    def read(self, name: str) -> Tensor:
        """Read back a plain tensor; of a quantised linear what its codes stand for, rounded to the dtype it had."""
        owner = self._owner(name)
        if owner is None:
            return super().read(name)
        linear = self._linears[owner]
        if owner in self._quantized:
            weight = unpack_codes(
                owner, super().read, self._masks[owner], self._dtypes[owner], ordered=owner in self._orders
            ).dequantize()
        else:
            weight = self._packed.unpack(owner, super().read, linear.shape)
        return linear.turned(weight).contiguous()

    def _owner(self, name: str) -> str | None:
        owner = name.removesuffix(".weight")
        return owner if owner != name and owner in self._linears else None
