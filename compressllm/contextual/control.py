"""What a model is doing at the moment, told to its MLPs in so many words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum


class Mode(Enum):
    """What tokens are put through the model for.

    The shape of an input never says it: a check has many tokens as a prompt has, and a one-token prompt one as a draft.
    """

    PREFILL = "prefill"
    """The prompt: dense, and selectors look at it."""
    DRAFT = "draft"
    """Tokens to be guessed: sparse."""
    CHECK = "check"
    """Tokens that were drafted: dense."""
    SCORE = "score"
    """A whole text at once: its first ``prompt`` tokens dense, the others sparse, as drafting one by one would do."""


@dataclass
class Control:
    """Shared by all MLPs of a model.

    Args:
        mode: What is being done.
        prompt: Dense tokens at the start, for SCORE only.
    """

    mode: Mode = Mode.CHECK
    prompt: int = 0

    @contextmanager
    def set(self, mode: Mode, prompt: int = 0) -> Iterator[None]:
        """Do something else for a while."""
        before = self.mode, self.prompt
        self.mode, self.prompt = mode, prompt
        try:
            yield
        finally:
            self.mode, self.prompt = before
