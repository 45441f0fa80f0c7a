"""Rows to train on, and the order they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from compressllm.core.errors import RecipeError


class Rows(Protocol):
    """Sequences of token ids with the labels of their positions."""

    @property
    def seqlen(self) -> int | None:
        """Tokens in a row, padding included; None where rows are of different lengths."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of all rows, the same on every machine."""
        ...

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What a model is called with, on the CPU, and the labels.

        All are (B, S) int64: ``input_ids``; ``labels``, the token that follows each position, -100 where there is
        none to predict (so they stand one place before where transformers wants them); where rows need them,
        ``attention_mask`` or ``position_ids``.
        """
        ...


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What to train on, and what to look at meanwhile.

    Args:
        train: The rows of one pass.
        held_out: Rows that are not trained on.
        facts: Where they came from, as plain data for the manifest.
        notes: What the user should know, one line each, to be warned of.
    """

    train: Rows
    held_out: Rows
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


class Order:
    """Which row each sample of a training run is: a pure function of the seed and the sample's global index.

    One pass takes every row once, in an order of its own. Neither the batch size nor the number of processes, nor
    where a run was resumed, changes which row sample i is.

    Args:
        rows: How many rows there are.
        seed: The run's.
    """

    def __init__(self, rows: int, seed: int) -> None:
        if rows < 1:
            raise RecipeError("there is no row to train on")
        self.rows, self.seed = rows, seed
        self._pass: tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]] | None = None

    def __getitem__(self, sample: int) -> int:
        number, place = divmod(sample, self.rows)
        if self._pass is None or self._pass[0] != number:
            self._pass = number, np.random.default_rng((self.seed, number)).permutation(self.rows)
        return int(self._pass[1][place])

    def indices(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """The rows of ``count`` samples from ``first`` on; of several processes each takes every ``ranks``-th."""
        return [self[sample] for sample in range(first + rank, first + count, ranks)]


def tensors_sha256(*tensors: Tensor) -> str:
    """Hash of integer tensors with their shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
