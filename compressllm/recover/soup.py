"""Soups: the average of models that were recovered from one pruned model, exactly as sparse as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from compressllm import __version__
from compressllm.core.errors import FormatError
from compressllm.core.masks import MaskStore
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import Facts
from compressllm.models.shards import file_sha256

_AT_ONCE: Final = 1 << 22  # weights averaged at a time, so that float64 copies stay small
#: Keys of a config that may differ between members: they say nothing of what the model computes.
_INCIDENTAL: Final = frozenset({"_name_or_path", "transformers_version", "dtype", "use_cache"})


class Soup(Checkpoint):
    """The average of several checkpoints, read tensor by tensor as if it were one; all else is the first's.

    Args:
        members: Of one architecture, and with the very same masks.
        notes: What to say of it in ``compressllm.json``, beside where its members came from.

    Raises: FormatError, naming the first difference, if they do not fit together.

    Source: Zimmer et al., Sparse Model Soups, ICLR 2024.
    """

    def __init__(self, members: Sequence[Path], notes: Mapping[str, Any] | None = None) -> None:
        super().__init__(members[0])
        self.members = [self, *(Checkpoint(folder) for folder in members[1:])]
        _check_alike(self.members)
        described = [{"folder": _name(one.folder), "sha256": _hashes(one)} for one in self.members]
        facts = self.facts or Facts(written_by=__version__)
        self.facts = facts.model_copy(update={"source": {"soup": {**(notes or {}), "members": described}}})
        self._transposed = {name for name, linear in facts.linears.items() if linear.transposed}

    def read(self, name: str) -> Tensor:
        """The members' mean, computed in float64, in the dtype they are stored in.

        Raises: FormatError if a member's weight is not zero where the masks prune, or if what is no float differs.
        """
        tensors = [super().read(name), *(one.read(name) for one in self.members[1:])]
        owner = name.removesuffix(".weight")
        if owner != name and (keep := self.mask(owner)) is not None:
            pruned = ~(keep.T if owner in self._transposed else keep)
            for member, tensor in zip(self.members, tensors, strict=True):
                if lost := int(((tensor != 0) & pruned).count_nonzero()):
                    raise FormatError(f"{member.folder}: {name} is not zero in {lost} places where its mask prunes")
        if not tensors[0].is_floating_point():
            for member, tensor in zip(self.members, tensors, strict=True):
                if not torch.equal(tensor, tensors[0]):
                    raise FormatError(f"{member.folder}: {name} holds integers and is not {self.folder}'s")
            return tensors[0]
        return _mean(tensors)


@dataclass(frozen=True)
class Chosen:
    """What a greedy soup is made of.

    Args:
        members: The folders, the best first.
        alone: Folder -> the held-out loss of that model alone, the best first.
        tried: The steps: which folder was tried, the loss with it, and whether it was taken.
        loss: Of the soup.
    """

    members: list[Path]
    alone: dict[str, float]
    tried: list[dict[str, Any]]
    loss: float


def choose_greedily(members: Sequence[Path], loss: Callable[[Checkpoint], float]) -> Chosen:
    """Begin with the best model and add the next best wherever the soup's held-out loss does not rise.

    Args:
        loss: Of a checkpoint on held-out text; called 2 n - 1 times.

    Raises: as `Soup`.
    """
    Soup(members)  # whether they fit together, before any work is done
    losses = {folder: loss(Checkpoint(folder)) for folder in members}
    first, *others = sorted(members, key=lambda folder: losses[folder])
    chosen, best, tried = [first], losses[first], []
    for folder in others:
        found = loss(Soup([*chosen, folder]))
        tried.append({"folder": str(folder), "loss": found, "taken": found <= best})
        if found <= best:
            chosen, best = [*chosen, folder], found
    alone = {str(folder): losses[folder] for folder in (first, *others)}
    return Chosen(chosen, alone, tried, best)


def _check_alike(members: Sequence[Checkpoint]) -> None:
    first = members[0]
    config, specs, masks = first.config().to_dict(), first.specs, first.masks()
    if not masks:
        raise FormatError(
            f"{first.folder}: holds no masks, and a soup is made of pruned models; "
            "if it merely lacks the file, `compressllm export` finds its zeros and writes it"
        )
    for other in members[1:]:
        if other.folder.resolve() == first.folder.resolve():
            raise FormatError(f"{other.folder}: is given twice")
        theirs = other.config().to_dict()
        differing = {key for key in config.keys() | theirs.keys() if config.get(key) != theirs.get(key)} - _INCIDENTAL
        if differing:
            raise FormatError(
                f"{other.folder}: its config differs from {first.folder}'s in {min(differing)}; "
                "only models of one architecture can be averaged"
            )
        if other.specs != specs:
            name = min(key for key in specs.keys() | other.specs.keys() if specs.get(key) != other.specs.get(key))
            raise FormatError(
                f"{other.folder}: {name} is not of the shape and dtype it has in {first.folder}; "
                "only models of one architecture, stored in one dtype, can be averaged"
            )
        _check_masks(first, masks, other)


def _check_masks(first: Checkpoint, masks: MaskStore, other: Checkpoint) -> None:
    theirs = other.masks()
    if theirs.sha256() == masks.sha256():
        return
    where = f"{other.folder}: its masks are not {first.folder}'s"
    if alone := masks.keys() ^ theirs.keys():
        where += f", only one of them has one of {min(alone)}"
    else:
        counts = {name: int((masks[name] != theirs[name]).sum()) for name in masks}
        name = max(counts, key=lambda each: counts[each] > 0)  # the first that differs
        where += f", that of {name} in {counts[name]} places"
    raise FormatError(
        f"{where}; an average would have fewer zeros, so recover the members from one pruned model with fixed masks"
    )


def _name(folder: Path) -> str:
    """``run/model`` of a run folder's model, whose own name says nothing."""
    return f"{folder.parent.name}/{folder.name}" if folder.name == "model" else folder.name


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    known = checkpoint.facts.sha256 if checkpoint.facts else {}
    return known or {path.name: file_sha256(path) for path in checkpoint.files}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """In float64, a piece at a time."""
    mean = torch.empty_like(tensors[0])
    pieces = zip(*(torch.split(tensor.view(-1), _AT_ONCE) for tensor in (mean, *tensors)), strict=True)
    for piece, first, *others in pieces:
        total = first.double()
        for other in others:
            total += other
        piece.copy_(total.div_(len(tensors)))
    return mean
