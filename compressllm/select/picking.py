"""The final choice: clusters in turn, the best record first, conflicting ones passed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from compressllm.select.concepts import ConceptGraph

# Share of a cluster that may be rejected, then the rest is taken as it comes: a graph that has grown dense with
# general phrases would reject nearly everything.
_REJECTED = 0.2
# Conflicts that are kept for the report.
_EXAMPLES = 10


@dataclass
class Picked:
    """What was chosen.

    Args:
        ids: In the order of choice.
        rejected: For each cluster, how many were passed over for a conflict.
        readmitted: For each cluster, how many of those were taken after all, for want of others.
        conflicts: The first few pairs of phrases that conflicted.
    """

    ids: list[int]
    rejected: list[int]
    readmitted: list[int]
    conflicts: list[tuple[str, str]] = field(default_factory=list)


def pick(
    best_first: Sequence[Sequence[int]], counts: Sequence[int], sizes: Sequence[int], phrases: Sequence[Sequence[str]]
) -> Picked:
    """Choose ``counts[c]`` records of every cluster ``c``, one of each in turn.

    Args:
        best_first: Candidates of each cluster, at least ``counts[c]``.
        sizes: Records of each cluster, of which a fifth may be rejected.
        phrases: Key phrases of every record of the pool.
    """
    clusters = range(len(best_first))
    graph = ConceptGraph()
    picked = Picked([], [0] * len(best_first), [0] * len(best_first))
    waiting = [iter(candidates) for candidates in best_first]
    passed: list[list[int]] = [[] for _ in clusters]
    left = list(counts)

    def next_of(cluster: int) -> int:
        for one in waiting[cluster]:
            conflict = graph.conflict(phrases[one]) if picked.rejected[cluster] < _REJECTED * sizes[cluster] else None
            if conflict is None:
                return one
            passed[cluster].append(one)
            picked.rejected[cluster] += 1
            if len(picked.conflicts) < _EXAMPLES:
                picked.conflicts.append(conflict)
        picked.readmitted[cluster] += 1
        return passed[cluster].pop(0)

    while any(left):
        for cluster in clusters:
            if left[cluster]:
                one = next_of(cluster)
                graph.add(phrases[one])
                picked.ids.append(one)
                left[cluster] -= 1
    return picked
