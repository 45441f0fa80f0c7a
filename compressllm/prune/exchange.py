"""Search for an order of channels under which an N:M pattern keeps the most score.

Scores are laid out (channels, rows), so that one channel is contiguous. A *place* is where a channel stands; places
``g * m`` to ``g * m + m - 1`` are group ``g``, of which every row keeps the ``n`` highest scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.pattern import NM

#: Elements gathered at one time, of scores and thresholds each.
SEARCHED_AT_ONCE = 1 << 24
#: The search ends when this many rounds in a row have together raised the retained score by less than `_SMALL` of it.
_PATIENCE = 24
_SMALL = 1e-4


@dataclass(frozen=True)
class Order:
    """An order of channels, and what it is worth.

    Args:
        places: (sets, channels) int64 on the CPU: the channel that stands at each place.
        before: Score retained with the channels as they came, over all score.
        dealt: The same after dealing channels out by importance.
        after: The same with the order found; never less than ``before``.
        rounds: Rounds of exchanges it took.
    """

    places: Tensor
    before: float
    dealt: float
    after: float
    rounds: int


def find_order(scores: Tensor, pattern: NM, rounds: int, seed: int) -> Order:
    """The order of channels under which the pattern keeps the most of these scores, as far as the search gets.

    It starts from the channels as they came or dealt out by importance, whichever retains more, and then lets pairs
    of groups exchange the one channel each that gains the most, as long as any gains. In one round each group meets
    one other; in as many rounds as there are groups it meets all others.

    A round costs ``m`` differences for every score, ``channels * rows * m`` in all: 3.5 million for a 135M model's
    down projection (1536 inputs, 576 rows), 38 million for 16384 rows of its residual stream; a hundred rounds of
    everything in it, some 17 thousand million. Pairs that have met and not changed since are passed over.

    Args:
        scores: (sets, rows, channels) float32, not negative. Sets have orders of their own; channels are a multiple
            of ``m`` in each.
        rounds: At most this many.
        seed: Decides who meets whom.

    Source: the dealing out is RIA's heuristic allocation (Zhang et al., Plug-and-Play, ICLR 2024); exchanges between
    pairs of groups are those of Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021.
    """
    sets, rows, channels = scores.shape
    by_channel = scores.transpose(1, 2).reshape(sets * channels, rows).contiguous()
    total = float(by_channel.sum(1, dtype=torch.float64).cpu().sum()) or 1.0
    first = torch.arange(sets, device=scores.device)[:, None] * channels
    came = first + torch.arange(channels, device=scores.device)
    dealt = first + deal(scores.sum(1, dtype=torch.float64), pattern.m)
    groups = [_Groups(by_channel, order.reshape(-1, pattern.m), pattern.n) for order in (came, dealt)]
    values = [one.retained() for one in groups]
    best = groups[values[1] > values[0]]
    del groups
    took = _exchange_(best, sets, rounds, seed)
    places = best.members.reshape(sets, channels) - first
    return Order(places.cpu(), values[0] / total, values[1] / total, best.retained() / total, took)


def deal(importance: Tensor, m: int) -> Tensor:
    """Deal channels out so that each group of ``m`` gets one of every level of importance.

    Sorted and cut into ``m`` equal levels, level ``q`` fills place ``q`` of all groups, every other level backwards.

    Args:
        importance: (sets, channels).

    Returns:
        (sets, channels) int64: the channel that stands at each place.
    """
    levels = importance.argsort(dim=1, stable=True).view(len(importance), m, -1)  # (sets, m, groups)
    levels = torch.stack([level.flip(1) if q % 2 else level for q, level in enumerate(levels.unbind(1))], dim=2)
    return levels.flatten(1)


def retained_score(scores: Tensor, pattern: NM) -> float:
    """Score that the pattern keeps of a (rows, channels) matrix in the order it is in."""
    return float(torch.where(pattern.keep(scores), scores, 0).sum(dtype=torch.float64))


class _Groups:
    """Groups of channels, and for each channel what its group would be worth with another in its place.

    Without channel i, a row of the group keeps ``n - 1`` scores for certain, ``rest_i`` in sum, and with newcomer x
    also the larger of x and its n-th best, ``bar_i``. So the group's worth is
    ``rest_i + sum_rows max(bar_i, x)``, and ``max(a, b) = (a + b + |a - b|) / 2`` makes all such sums L1 distances.

    Args:
        scores: (channels, rows).
        members: (groups, m) channels. Changed in place by `exchange_`.
        n: Scores kept of each row of a group.
    """

    def __init__(self, scores: Tensor, members: Tensor, n: int) -> None:
        self.scores, self.members, self.n = scores, members, n
        self.sums = scores.sum(1, dtype=torch.float64)  # (channels,)
        self.bars = torch.empty_like(scores)  # (channels, rows)
        self.worth = self.sums.new_empty(len(members))  # (groups,), what each keeps
        self.fixed = torch.empty_like(self.sums)  # (channels,), rest_i + sum(bar_i) / 2
        step = max(1, SEARCHED_AT_ONCE // (members.shape[1] * scores.shape[1]))
        for group in torch.split(torch.arange(len(members), device=scores.device), step):
            self._note_(group, members[group])

    def retained(self) -> float:
        """What all groups keep."""
        return float(self.worth.cpu().sum())

    def best_exchanges(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """For each pair of groups, the place in either whose channels are best exchanged: (pairs,) and (pairs,)."""
        a, b = self.members[one], self.members[other]  # (pairs, m) each
        with_b = torch.cdist(_rows(self.bars, a), _rows(self.scores, b), p=1).double()  # (pairs, m of a, m of b)
        with_a = torch.cdist(_rows(self.bars, b), _rows(self.scores, a), p=1).double().mT
        fixed = self.fixed[a][:, :, None] + self.fixed[b][:, None, :]
        sums = self.sums[a][:, :, None] + self.sums[b][:, None, :]
        value = fixed + (sums + with_a + with_b) / 2
        best = value.flatten(1).argmax(1)
        return best // a.shape[1], best % a.shape[1]

    def exchange_(self, one: Tensor, other: Tensor, from_one: Tensor, from_other: Tensor) -> Tensor:
        """Exchange a channel in each pair of groups where that gains; (pairs,) bool, whether it did.

        The gain is counted anew in float64, so that what is retained never falls.
        """
        a, b = self.members[one].clone(), self.members[other].clone()
        pair = torch.arange(len(one), device=one.device)
        a[pair, from_one], b[pair, from_other] = b[pair, from_other], a[pair, from_one]
        gain = self._worth(a) + self._worth(b) - self.worth[one] - self.worth[other]
        better = gain > 0
        for group, members in ((one, a), (other, b)):
            self.members[group[better]] = members[better]
            self._note_(group[better], members[better])
        return better

    def _note_(self, group: Tensor, members: Tensor) -> None:
        """Keep what follows from these groups' members."""
        inside = _rows(self.scores, members)  # (groups, m, rows)
        best = _highest(inside, self.n + 1)
        top = sum(best[1 : self.n], best[0])  # (groups, rows)
        last, next_best = best[self.n - 1][:, None], best[self.n][:, None]
        self.worth[group] = top.sum(1, dtype=torch.float64)
        kept = inside >= last  # ties are worth the same either way
        bars = torch.where(kept, next_best, last)
        rest = top[:, None] - inside.maximum(last)
        self.bars.index_copy_(0, members.flatten(), bars.flatten(0, 1))
        self.fixed[members] = rest.sum(2, dtype=torch.float64) + bars.sum(2, dtype=torch.float64) / 2

    def _worth(self, members: Tensor) -> Tensor:
        best = _highest(_rows(self.scores, members), self.n)
        return sum(best[1:], best[0]).sum(1, dtype=torch.float64)


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    """``matrix[index]``, copied row by row: indexing copies element by element, several times slower."""
    return matrix.index_select(0, index.flatten()).view(*index.shape, matrix.shape[1])


def _highest(values: Tensor, count: int) -> list[Tensor]:
    """The ``count`` highest of (groups, m, rows) along m, in falling order: (groups, rows) each."""
    # Bubbles of elementwise minima and maxima: for few values, far quicker than sorting along a middle dimension.
    left, best = list(values.unbind(1)), []
    for _ in range(count):
        highest = left[0]
        for place in range(1, len(left)):
            left[place - 1], highest = torch.minimum(highest, left[place]), torch.maximum(highest, left[place])
        left.pop()
        best.append(highest)
    return best


def _exchange_(groups: _Groups, sets: int, rounds: int, seed: int) -> int:
    """Let groups of the same set exchange channels; how many rounds it took."""
    count, m = groups.members.shape
    count //= sets
    first = torch.arange(sets)[:, None] * count
    settled = torch.zeros(sets * count, count, dtype=torch.bool)  # met, and neither has changed since
    history = [groups.retained()]
    step = max(1, SEARCHED_AT_ONCE // (m * groups.scores.shape[1]))
    for meetings in _meetings(sets, count, rounds, seed):
        one, other = (first + meetings[..., 0]).flatten(), (first + meetings[..., 1]).flatten()
        new = ~settled[one, other % count]
        one, other = one[new], other[new]
        for a, b in zip(torch.split(one, step), torch.split(other, step), strict=True):
            at_a, at_b = a.to(groups.scores.device), b.to(groups.scores.device)
            changed = groups.exchange_(at_a, at_b, *groups.best_exchanges(at_a, at_b)).cpu()
            settled[a, b % count] = settled[b, a % count] = True
            for group in (a[changed], b[changed]):
                settled[group] = False
                settled.view(sets, count, count)[group // count, :, group % count] = False
        history.append(groups.retained())
        if len(history) > _PATIENCE and history[-1] - history[-1 - _PATIENCE] < _SMALL * history[-1]:
            break
    return len(history) - 1


def _meetings(sets: int, count: int, rounds: int, seed: int) -> Iterator[Tensor]:
    """Who meets whom: (sets, pairs, 2) groups a round. All pairs meet once before any meets again."""
    generator = torch.Generator().manual_seed(seed)
    even = count + count % 2
    if even < 2:
        return
    circle = even - 1  # all but the last sit in a circle and turn one seat a round
    offset = torch.arange(1, even // 2)
    for number in range(rounds):
        turn = number % circle
        if turn == 0:
            names = torch.rand(sets, even, generator=generator).argsort(dim=1, stable=True)
        seats = torch.stack([(turn + offset) % circle, (turn - offset) % circle], 1)
        seats = torch.cat([torch.tensor([[turn, circle]]), seats])
        pairs = names[:, seats]  # (sets, pairs, 2)
        if even > count:  # whoever meets the one too many sits the round out
            pairs = torch.stack([one[(one < count).all(1)] for one in pairs])
        yield pairs
