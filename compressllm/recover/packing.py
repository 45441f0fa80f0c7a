"""Several records in one row, none of which sees the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.errors import UnsupportedModelError
from compressllm.recover.conversation import Encoded
from compressllm.recover.rows import tensors_sha256

_OPEN_ROWS: Final = 64  # rows looked at for room for a record


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of one length that hold several records each. Positions start at 0 with every record, and with padding:
    by that transformers sees that no record may look at another.

    Args:
        ids: (n, seqlen) int32.
        labels: (n, seqlen) int32.
        positions: (n, seqlen) int32.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def seqlen(self) -> int:
        """Tokens in a row."""
        return self.ids.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of ids, labels and positions."""
        return tensors_sha256(self.ids, self.labels, self.positions)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``position_ids``, (B, seqlen) int64."""
        at = torch.as_tensor(indices)
        return {
            "input_ids": self.ids[at].long(),
            "labels": self.labels[at].long(),
            "position_ids": self.positions[at].long(),
        }


def pack_records(records: Sequence[Encoded], seqlen: int, pad: int) -> PackedRows:
    """Records of at most ``seqlen`` tokens put into rows, each whole, in the first open row with room for it."""
    full: list[list[Encoded]] = []
    open_rows: list[tuple[int, list[Encoded]]] = []  # tokens in it, records
    for record in records:
        length = len(record.ids)
        at = next((at for at, (used, _) in enumerate(open_rows) if used + length <= seqlen), None)
        if at is None:
            if len(open_rows) == _OPEN_ROWS:
                full.append(open_rows.pop(max(range(_OPEN_ROWS), key=lambda at: open_rows[at][0]))[1])
            open_rows.append((length, [record]))
        else:
            used, row = open_rows[at]
            open_rows[at] = (used + length, [*row, record])
    rows = full + [row for _, row in open_rows]
    ids = torch.full((len(rows), seqlen), pad, dtype=torch.int32)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = 0
        for record in row:
            end = start + len(record.ids)
            ids[index, start:end] = torch.tensor(record.ids, dtype=torch.int32)
            labels[index, start:end] = torch.tensor(record.labels(), dtype=torch.int32)
            positions[index, start:end] = torch.arange(len(record.ids), dtype=torch.int32)
            start = end
        positions[index, start:] = torch.arange(seqlen - start, dtype=torch.int32)
    return PackedRows(ids, labels, positions)


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model in which records packed into one row see each other. Raises UnsupportedModelError."""
    device = model.get_input_embeddings().weight.device
    first, second = torch.arange(2, 7, device=device), torch.arange(5, 11, device=device)
    packed = torch.cat([first, second]).unsqueeze(0)
    positions = torch.cat([torch.arange(5), torch.arange(6)]).to(device).unsqueeze(0)
    together = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0, 5:].float()
    alone = model(input_ids=second.unsqueeze(0), use_cache=False).logits[0].float()
    error = float((together - alone).abs().max() / alone.abs().max().clamp_min(1e-6))
    if not error <= max(1e-3, 8 * torch.finfo(model.dtype).eps):
        raise UnsupportedModelError(
            f"{type(model).__name__}: records packed into one row see each other; train with packing off"
        )
