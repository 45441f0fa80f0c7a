"""What every allocator promises, over the registry."""

from collections.abc import Iterator, Mapping

import pytest
import torch

from compressllm.core.protocols import ALLOCATORS, DenseLinear
from compressllm.core.registry import build
from compressllm.core.stats import InputStats

SHAPES = {"0.a": (6, 10), "0.b": (5, 8), "1.a": (9, 10), "1.b": (5, 8), "2.a": (6, 30)}


def weight(name: str, equal: bool) -> torch.Tensor:
    if equal:
        return torch.ones(SHAPES[name])
    generator = torch.Generator().manual_seed(list(SHAPES).index(name))
    drawn = torch.randn(SHAPES[name], generator=generator)
    return drawn * (1 + 20 * (torch.rand(SHAPES[name], generator=generator) < 0.03 * int(name[0])))


@pytest.mark.parametrize("equal", [False, True], ids=["drawn", "equal"])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_allocator_keeps_its_contract(name: str, sparsity: float, equal: bool) -> None:
    weights = {linear: weight(linear, equal) for linear in SHAPES}
    before = {linear: one.clone() for linear, one in weights.items()}
    allocator = build(ALLOCATORS, name)

    def dense() -> Iterator[tuple[str, Mapping[str, DenseLinear]]]:
        for block in "012":
            turn = {"block": block}

            def linear_of(name: str, turn: dict[str, str] = turn) -> DenseLinear:
                def read() -> torch.Tensor:
                    assert turn, "a linear was read after its block's turn"
                    return weights[name]

                ones = torch.ones(SHAPES[name][1])
                return DenseLinear(read, InputStats(3, **dict.fromkeys(allocator.needs, ones)))

            yield block, {name: linear_of(name) for name in SHAPES if name[0] == block}
            turn.clear()

    sizes = {linear: one.numel() for linear, one in weights.items()}
    made, again = (allocator.allocate(dense, sizes, sparsity) for _ in range(2))
    assert made == again
    assert set(made.sparsity) == set(sizes)
    assert all(0.0 <= one <= 1.0 for one in made.sparsity.values())
    total = sum(made.sparsity[linear] * size for linear, size in sizes.items())
    assert total == pytest.approx(sparsity * sum(sizes.values()), abs=0.5 + 1e-6)  # to the nearest weight
    assert all(torch.equal(before[linear], one) for linear, one in weights.items())
