"""How the Triton kernel's work is cut up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from compressllm.kernels.gpu.choices import fastest


class Config(NamedTuple):
    """One way to cut it up.

    Args:
        block_rows: Rows of the weight a program computes.
        splits: Parts the columns are cut into, added up afterwards; a divisor of the number of tiles.
        warps: Warps of a program.
        stages: Tiles in flight, one of them being computed.
    """

    block_rows: int
    splits: int
    warps: int
    stages: int


def default_config(rows: int, tiles: int, tokens: int, bits: int, processors: int, shared: int) -> Config:
    """Just enough splits for about two programs a multiprocessor.

    Two hide each other's waiting; each split more is one more partial sum to write and read.

    Args:
        processors: Multiprocessors of the GPU.
        shared: Bytes of shared memory that a program may have.
    """
    programs = -(-rows // 64) * -(-tokens // 32)
    enough = (d for d in divisors(tiles) if 8 * programs * d >= 15 * processors)
    stages = 3 if bits == 4 and tokens <= 16 and shared >= 160 << 10 else 2
    return Config(64, next(enough, tiles), 4, stages)


def candidates(tiles: int, bits: int, default: Config) -> list[Config]:
    """Ways worth measuring: more or fewer splits, more rows or stages."""
    near = [d for d in divisors(tiles) if default.splits <= 4 * d <= 16 * default.splits]
    stages = (2, 3) if bits == 16 else (2, 3, 4)
    return [Config(rows, d, rows // 16, s) for rows in (64, 128) for d in near for s in stages]


def fastest_of(compute: Callable[[Config], Tensor], tried: Iterable[Config], too_large: type[Exception]) -> Config:
    """The fastest of those that fit on the GPU."""
    able = []
    for config in tried:
        try:
            compute(config)
        except too_large:
            continue
        able.append(config)
    return able[fastest([functools.partial(compute, config) for config in able])]


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    return [d for d in range(1, number + 1) if number % d == 0]
