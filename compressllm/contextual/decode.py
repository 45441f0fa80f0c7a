"""The decoding loop: drafts by few neurons, checks by all of them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressllm.contextual.attach import Contextual
from compressllm.contextual.cache import DraftCache
from compressllm.contextual.control import Mode
from compressllm.contextual.sampling import Sampler, accept_drawn, probabilities
from compressllm.contextual.tree import grow_tree
from compressllm.core.errors import RecipeError, UnsupportedModelError
from compressllm.core.protocols import Corrector


@dataclass
class Counts:
    """What a generation has done.

    Args:
        tokens: Tokens emitted, the one that the prompt gave included.
        drafts: Sparse passes.
        checks: Dense passes after the prompt's.
        checked: Tokens those have read.
        advances: Tokens that each cycle of draft and check has given, before any cut by an end.
        prompt_seconds: Until the first token, choosing and gathering neurons included.
        seconds: After that.
    """

    tokens: int = 0
    drafts: int = 0
    checks: int = 0
    checked: int = 0
    advances: list[int] = field(default_factory=list)
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    def advance_length(self, all_cycles: bool = False) -> float | None:
        """Tokens a cycle, without the last, which an end cuts short; None if there was no other."""
        counted = self.advances if all_cycles else self.advances[:-1]
        return sum(counted) / len(counted) if counted else None

    def tokens_per_second(self) -> float | None:
        """Of those after the first; None if there was none."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class Decoding:
    """One text being generated.

    The cache holds, whenever a span has been given out, the rows of all tokens but the last; with a corrector they are
    the dense model's.

    Args:
        contextual: The model, or a plain one in its place, which then is decoded densely.
        ids: (1, tokens) of the prompt, at least one.
        limit: Most tokens to add, at least one.
        corrector: None drafts without checks.
        sampler: How tokens are taken.
        ends: Ids after which nothing comes.
        stops: Given all ids so far, whether that was all; asked after every token.

    Raises: RecipeError for several sequences, an empty prompt, or sampling from a tree; UnsupportedModelError for a
        tree in a model whose attention slides.
    """

    def __init__(
        self,
        contextual: Contextual,
        ids: Tensor,
        limit: int,
        corrector: Corrector | None = None,
        sampler: Sampler | None = None,
        ends: Collection[int] = (),
        stops: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        if ids.dim() != 2 or ids.shape[0] != 1:
            raise RecipeError(
                f"contextual decoding takes one prompt at a time, got {tuple(ids.shape)}; give them in turn"
            )
        if not ids.shape[1] or limit < 1:
            raise RecipeError(f"a prompt of {ids.shape[1]} tokens and {limit} to add: at least one of each is needed")
        self.contextual, self.model, self.corrector = contextual, contextual.model, corrector
        self.sampler, self.ends, self.stops = sampler or Sampler(), frozenset(ends), stops
        self.tokens: list[int] = ids[0].tolist()
        self.counts, self.done = Counts(), False
        self._end = len(self.tokens) + limit
        width = corrector.width if corrector else 1
        if width > 1:
            self._check_tree()
        nodes = 1 + ((corrector.period if corrector else 1) - 1) * width
        self.cache = DraftCache(self.model.config, self._end + nodes)
        self._positions = torch.arange(self._end + nodes, device=ids.device)[None]
        self._prompt = ids
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def spans(self) -> Iterator[list[int]]:
        """The tokens, as many at a time as come at once."""
        begun = time.perf_counter()
        first = self._start()
        self.counts.prompt_seconds = time.perf_counter() - begun
        yield first
        while not self.done:
            begun = time.perf_counter()
            span = self._advance()
            self.counts.seconds += time.perf_counter() - begun
            yield span

    @torch.inference_mode()
    def _start(self) -> list[int]:
        self.contextual.begin_prompt()
        with self.contextual.control.set(Mode.PREFILL):
            logits = self.forward(self._prompt, 1)
        self.contextual.choose_neurons()
        return self._emit([self.sampler.take(self.sampler.process(logits, self.tokens)[0])])

    @torch.inference_mode()
    def _advance(self) -> list[int]:
        if self.corrector is None:
            logits = self._draft(self.tokens[-1])
            return self._emit([self.sampler.take(self.sampler.process(logits, self.tokens)[0])])
        room = min(self.corrector.period, self._end - len(self.tokens))
        if self.corrector.width > 1 and room > 1:
            new = grow_tree(self, self.corrector, room)
        else:
            new = self._cycle(self.corrector, room)
        self.counts.advances.append(len(new))
        return self._emit(new)

    def _cycle(self, corrector: Corrector, room: int) -> list[int]:
        """Draft up to ``room`` - 1 tokens, have the dense model read them; those that stand, and one more."""
        drafted: list[int] = []
        drawn_from: list[Tensor] = []
        while len(drafted) < room - 1:
            logits = self._draft(drafted[-1] if drafted else self.tokens[-1])
            scores = self.sampler.process(logits, [*self.tokens, *drafted])[0]
            if self.sampler.drawn:
                drawn_from.append(probabilities(scores))
            drafted.append(self.sampler.take(scores))
            if drafted[-1] in self.ends:
                break
        self.cache.rewind(len(drafted))
        logits = self.check([self.tokens[-1], *drafted])
        scores = self.sampler.process(logits, self.tokens, drafted)
        if self.sampler.drawn and corrector.exact:
            stand, following = accept_drawn(drafted, drawn_from, probabilities(scores))
        else:
            stand = self._standing(corrector, drafted, logits, scores)
            following = self.sampler.take(scores[stand])
        self.cache.rewind(len(drafted) - stand)
        return [*drafted[:stand], following]

    def _standing(self, corrector: Corrector, drafted: Sequence[int], logits: Tensor, scores: Tensor) -> int:
        if not drafted:
            return 0
        tokens, best = torch.tensor(drafted, device=logits.device), scores[:-1].argmax(-1)
        accepted = corrector.accepts(tokens, logits[:-1], best).tolist()
        for at, token in enumerate(drafted):
            # An end that is merely likely would cut texts short.
            if not accepted[at] or (token in self.ends and token != int(best[at])):
                return at
        return len(drafted)

    def forward(self, ids: Tensor, keep: int, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(keep, vocabulary) logits after the last of (1, n) ids, whose rows are added to the cache."""
        if positions is None:
            start = self.cache.length
            positions = self._positions[:, start : start + ids.shape[1]]
        more: dict[str, int | Tensor] = {"logits_to_keep": keep} if self._keeps else {}
        if mask is not None:
            more["attention_mask"] = mask
        out = self.model(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, return_dict=True, **more
        )
        return out.logits[0, -keep:]  # type: ignore[no-any-return]

    def check(self, tokens: Sequence[int]) -> Tensor:
        """(n, vocabulary) logits by the dense model, whose rows are added to the cache."""
        self.counts.checks += 1
        self.counts.checked += len(tokens)
        with self.contextual.control.set(Mode.CHECK):
            return self.forward(torch.tensor([tokens], device=self._prompt.device), len(tokens))

    def _draft(self, token: int) -> Tensor:
        self.counts.drafts += 1
        with self.contextual.control.set(Mode.DRAFT):
            return self.forward(torch.tensor([[token]], device=self._prompt.device), 1)

    def _emit(self, new: Sequence[int]) -> list[int]:
        """Add tokens up to an end, and forget the rows of those behind it."""
        given: list[int] = []
        for token in new:
            given.append(token)
            self.tokens.append(token)
            ended = token in self.ends or len(self.tokens) >= self._end
            if ended or (self.stops is not None and self.stops(self.tokens)):
                self.done = True
                break
        self.counts.tokens += len(given)
        self.cache.rewind(self.cache.length - (len(self.tokens) - 1))
        return given

    def _check_tree(self) -> None:
        if self.sampler.drawn:
            raise RecipeError("a tree of drafts is greedy; sample with width 1")
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
            raise UnsupportedModelError("a tree of drafts needs full attention, and this model's slides; take width 1")
