"""Several drafts at once, as a tree that the dense model reads in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressllm.contextual.control import Mode
from compressllm.core.protocols import Corrector

if TYPE_CHECKING:
    from compressllm.contextual.decode import Decoding

_TEMPERATURE = 0.6  # of the beams' likelihoods, as published


def grow_tree(decoding: Decoding, corrector: Corrector, room: int) -> list[int]:
    """Draft ``width`` beams of ``room`` - 1 tokens, keep the beam of which most stands; its tokens, and one more.

    A beam is extended by its most likely tokens, and the likeliest beams stay. Ends are never drafted: the dense model
    alone ends a text. Nodes lie in the cache in the order they were made, and each sees its own ancestors only.

    Source: Sirius, arXiv 2409.03856, section 5.3, and its published code's beam search.
    """
    base, width = decoding.cache.length, corrector.width
    tokens, parents, depths = [decoding.tokens[-1]], [-1], [0]
    beams, likelihoods = [0], torch.zeros(1, dtype=torch.float64)
    for depth in range(1, room):
        with decoding.contextual.control.set(Mode.DRAFT):
            logits = _read(decoding, tokens, parents, depths, beams, base)
        decoding.counts.drafts += 1
        after = (logits.double() / _TEMPERATURE).log_softmax(-1).cpu()
        after[:, torch.tensor(sorted(decoding.ends), dtype=torch.long)] = -torch.inf
        best = after.topk(min(width, after.shape[-1]), dim=-1)
        total = (likelihoods[:, None] + best.values).flatten()
        order = total.sort(descending=True, stable=True).indices[:width]
        likelihoods = total[order]
        made = []
        for at in order.tolist():
            beam, rank = divmod(at, best.indices.shape[1])
            made.append(len(tokens))
            tokens.append(int(best.indices[beam, rank]))
            parents.append(beams[beam])
            depths.append(depth)
        beams = made
    decoding.cache.rewind(decoding.cache.length - base)
    decoding.counts.checks += 1
    decoding.counts.checked += len(tokens)
    with decoding.contextual.control.set(Mode.CHECK):
        logits = _read(decoding, tokens, parents, depths, list(range(len(tokens))), base)
    path = _longest(decoding, corrector, tokens, parents, beams, logits)
    decoding.cache.keep(base, path)
    accepted = [tokens[node] for node in path[1:]]
    scores = decoding.sampler.process(logits[path[-1]][None], [*decoding.tokens, *accepted])
    return [*accepted, decoding.sampler.take(scores[0])]


def _longest(
    decoding: Decoding, corrector: Corrector, tokens: list[int], parents: list[int], beams: list[int], logits: Tensor
) -> list[int]:
    """The nodes that stand of the best beam, root first: most of them, of equal ones the likeliest draft's."""
    best = logits.argmax(-1)
    if decoding.sampler.processors is not None:
        rows = [
            decoding.sampler.process(
                logits[node][None], [*decoding.tokens, *(tokens[n] for n in _path(parents, node)[1:])]
            )
            for node in range(len(tokens))
        ]
        best = torch.cat(rows).argmax(-1)
    above = torch.tensor(parents[1:], device=logits.device)
    drafted = torch.tensor(tokens[1:], device=logits.device)
    stands = [True, *corrector.accepts(drafted, logits[above], best[above]).tolist()]
    paths = []
    for beam in beams:
        path = _path(parents, beam)
        paths.append(path[: next((at for at, node in enumerate(path) if not stands[node]), len(path))])
    return max(paths, key=len)  # the first of equal ones


def _path(parents: list[int], node: int) -> list[int]:
    """From the root to a node."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _read(
    decoding: Decoding, tokens: list[int], parents: list[int], depths: list[int], nodes: list[int], base: int
) -> Tensor:
    """(nodes, vocabulary) logits of the newest nodes, which are added to the cache."""
    device, dtype = decoding.model.device, decoding.model.dtype
    mask = torch.zeros(len(nodes), base + len(tokens), dtype=dtype)
    mask[:, base:] = torch.finfo(dtype).min  # eager attention adds it, so not a bool
    for row, node in enumerate(nodes):
        mask[row, [base + ancestor for ancestor in _path(parents, node)]] = 0
    ids = torch.tensor([[tokens[node] for node in nodes]], device=device)
    positions = torch.tensor([[base + depths[node] for node in nodes]], device=device)
    return decoding.forward(ids, len(nodes), mask.to(device)[None, None], positions)
