import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from compressllm.core.pattern import NM
from compressllm.prune import exchange
from compressllm.prune.exchange import deal, find_order

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(1, 2)]


def random_scores(sets: int, rows: int, channels: int, seed: int = 0) -> Tensor:
    """(sets, rows, channels): some channels matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(sets, 1, channels, generator=generator).exp()
    return torch.randn(sets, rows, channels, generator=generator).abs() * size


def kept(scores: Tensor, order: list[int], pattern: NM) -> float:
    """Score that the pattern keeps with the channels in this order, one row and group at a time."""
    total = 0.0
    for row in scores.double().tolist():
        for start in range(0, len(order), pattern.m):
            group = sorted(row[channel] for channel in order[start : start + pattern.m])
            total += sum(group[-pattern.n :])
    return total


def test_dealing_gives_each_group_one_of_every_level() -> None:
    order = deal(torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7], [7.0, 6, 5, 4, 3, 2, 1, 0]]), 4)
    assert order.tolist() == [[0, 3, 4, 7, 1, 2, 5, 6], [7, 4, 3, 0, 6, 5, 2, 1]]
    shuffled = deal(torch.rand(3, 40, generator=torch.Generator().manual_seed(0)), 8)
    assert (shuffled.sort(dim=1).values == torch.arange(40)).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_an_order_is_worth_is_what_the_pattern_keeps(pattern: NM) -> None:
    scores = random_scores(2, 5, 24)
    found = find_order(scores, pattern, rounds=6, seed=0)
    total = float(scores.double().sum())
    came, dealt = list(range(24)), deal(scores.sum(1, dtype=torch.float64), pattern.m).tolist()
    assert found.places.shape == (2, 24)
    assert (found.places.sort(dim=1).values == torch.arange(24)).all()
    assert found.before == pytest.approx(sum(kept(one, came, pattern) for one in scores) / total, rel=1e-6)
    for name, orders in (("dealt", dealt), ("after", found.places.tolist())):
        expected = sum(kept(one, order, pattern) for one, order in zip(scores, orders, strict=True)) / total
        assert getattr(found, name) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_retained_never_falls(pattern: NM) -> None:
    scores = random_scores(1, 9, 32)
    retained = [find_order(scores, pattern, rounds, seed=0).after for rounds in range(8)]
    found = find_order(scores, pattern, 0, seed=0)
    assert retained[0] == max(found.before, found.dealt)
    assert retained == sorted(retained)
    assert retained[-1] > retained[0]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4)], ids=str)
def test_the_best_exchange_is_brute_forces(pattern: NM) -> None:
    for seed in range(5):
        scores = random_scores(1, 6, 8, seed)[0]
        groups = exchange._Groups(scores.T.contiguous(), torch.arange(8).view(2, 4), pattern.n)
        (one,), (other,) = groups.best_exchanges(torch.tensor([0]), torch.tensor([1]))
        worth = {}
        for a, b in itertools.product(range(4), range(4, 8)):
            order = list(range(8))
            order[a], order[b] = b, a
            worth[a, b - 4] = kept(scores, order, pattern)
        assert worth[int(one), int(other)] == pytest.approx(max(worth.values()), rel=1e-6)


def test_search_ends_where_no_exchange_gains_and_often_at_the_best_of_all_orders() -> None:
    pattern, optimal = NM(2, 4), 0
    for seed in range(8):
        scores = random_scores(1, 6, 8, seed)
        found = find_order(scores, pattern, rounds=30, seed=0)
        order, total = found.places[0].tolist(), float(scores.double().sum())
        after = kept(scores[0], order, pattern)
        for a, b in itertools.product(range(4), range(4, 8)):
            order[a], order[b] = order[b], order[a]
            assert kept(scores[0], order, pattern) <= after * (1 + 1e-6)
            order[a], order[b] = order[b], order[a]
        partitions = list(itertools.combinations(range(1, 8), 3))
        best = max(kept(scores[0], [0, *rest, *sorted(set(range(1, 8)) - set(rest))], pattern) for rest in partitions)
        assert after <= best * (1 + 1e-6)
        optimal += after >= best * (1 - 1e-6)
        assert found.after == pytest.approx(after / total, rel=1e-6)
    assert optimal >= 4


def test_same_seed_same_order_whatever_the_threads_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(2, 50, 32)
    first = find_order(scores, NM(2, 4), 10, seed=3)
    monkeypatch.setattr(exchange, "SEARCHED_AT_ONCE", 1000)
    torch.set_num_threads(2)
    try:
        again = find_order(scores.transpose(1, 2).contiguous().transpose(1, 2), NM(2, 4), 10, seed=3)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(first.places, again.places)
    assert (first.before, first.dealt, first.after) == (again.before, again.dealt, again.after)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_all_groups_meet_before_any_meet_again(count: int) -> None:
    rounds = count - 1 + count % 2
    meetings = list(exchange._meetings(3, count, 2 * rounds, seed=0))
    for part in (meetings[:rounds], meetings[rounds:]):
        for one in range(3):
            met = Counter(frozenset(pair) for pairs in part for pair in pairs[one].tolist())
            assert set(met) == {frozenset(pair) for pair in itertools.combinations(range(count), 2)}
            assert set(met.values()) == {1}


def test_nothing_to_exchange_and_nothing_to_see() -> None:
    alone = find_order(random_scores(3, 5, 4), NM(2, 4), 10, seed=0)
    assert alone.before == pytest.approx(alone.after)
    blank = find_order(torch.zeros(1, 5, 16), NM(2, 4), 10, seed=0)
    assert torch.equal(blank.places, torch.arange(16)[None])
    assert blank.after == 0
