import itertools
import random

import pytest

from compressllm.select.budget import share_budget


def test_sums_exactly_and_stays_within_bounds() -> None:
    draw = random.Random(0)
    for _ in range(500):
        sizes = [draw.randint(1, 60) for _ in range(draw.randint(1, 12))]
        weights = [draw.choice([0.0, draw.random()]) for _ in sizes]
        budget = draw.randint(1, sum(sizes))
        counts = share_budget(budget, weights, sizes, 0.01)
        assert sum(counts) == budget
        assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_is_in_proportion_by_largest_remainder() -> None:
    # 10 * 1/7, 2/7, 4/7 are 1.43, 2.86 and 5.71.
    assert share_budget(10, [1, 2, 4], [100, 100, 100], 0.0) == [1, 3, 6]
    assert share_budget(10, [1, 1, 1], [100, 100, 100], 0.0) == [4, 3, 3]


def test_what_a_cluster_cannot_take_goes_to_the_others() -> None:
    assert share_budget(90, [10, 1, 1], [10, 100, 100], 0.0) == [10, 40, 40]
    assert share_budget(30, [1, 0, 0], [10, 100, 100], 0.0) == [10, 10, 10]


def test_every_cluster_gets_its_floor() -> None:
    assert share_budget(100, [1, 1000, 1000], [50, 500, 500], 0.05) == [5, 48, 47]
    assert share_budget(100, [1, 1000], [3, 500], 0.05) == [3, 97]
    assert share_budget(6, [1, 1, 1], [9, 9, 9], 1.0) == [2, 2, 2], "a floor that all cannot have"


def test_equal_where_nothing_is_damaged() -> None:
    assert share_budget(30, [0, 0], [10, 90], 0.0) == [3, 27]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_clusters_does_not_matter(order: tuple[int, ...]) -> None:
    weights, sizes = [0.5, 3.0, 1.1], [40, 12, 90]
    plain = share_budget(41, weights, sizes, 0.01)
    moved = share_budget(41, [weights[one] for one in order], [sizes[one] for one in order], 0.01)
    assert moved == [plain[one] for one in order]
