"""The concept graph that keeps chosen records from contradicting each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


class ConceptGraph:
    """Phrases of the records chosen so far, joined where one record has both.

    A record conflicts if two of its phrases are known, each from other records, but were never together: it would
    join concepts that everything else keeps apart. The first records of any kind cannot conflict, so the order in
    which records come matters.

    Source: He et al., PASER, arXiv 2502.12594, concept consistency graph.
    """

    def __init__(self) -> None:
        self._beside: dict[str, set[str]] = {}

    def conflict(self, phrases: Sequence[str]) -> tuple[str, str] | None:
        """Two phrases that conflict, or None."""
        known = [phrase for phrase in phrases if phrase in self._beside]
        return next(((a, b) for a, b in combinations(known, 2) if b not in self._beside[a]), None)

    def add(self, phrases: Sequence[str]) -> None:
        """Take in a chosen record."""
        for phrase in phrases:
            self._beside.setdefault(phrase, set())
        for a, b in combinations(phrases, 2):
            self._beside[a].add(b)
            self._beside[b].add(a)
