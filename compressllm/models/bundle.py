"""Bundle: what passes from stage to stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressllm.core.errors import FormatError
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import SparsityPattern
from compressllm.core.quantized import StoredCodes
from compressllm.core.scheme import parse_scheme
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model, load_tokenizer, skeleton
from compressllm.models.resolve import resolve_model
from compressllm.models.tensornames import tensor_names


@dataclass(frozen=True)
class Bundle:
    """A model with its tokenizer and masks.

    Args:
        model: The model. With a ``checkpoint``, only its modules: the parameters are on the meta device and
            the weights are read from the checkpoint when they are needed.
        tokenizer: None if the checkpoint carries none; enough for token ids.
        masks: Linear name -> keep mask, of the linears that are sparse.
        patterns: Linear name -> pattern, likewise.
        checkpoint: Where the weights are; None if ``model`` holds them itself.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    masks: MaskStore = field(default_factory=MaskStore)
    patterns: Mapping[str, SparsityPattern] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None

    def live(
        self,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        swap: Callable[[str, nn.Linear], nn.Module] = lambda name, linear: linear,
    ) -> PreTrainedModel:
        """The whole model in memory; the bundle's own if it holds its weights itself.

        Args:
            swap: As `load_model` takes it; not called for the bundle's own model.
        """
        return self.model if self.checkpoint is None else load_model(self.checkpoint, dtype, device, swap)

    def check_masks(self, but: Collection[str] = ()) -> None:
        """Raise FormatError if the checkpoint calls a linear sparse whose mask it lacks, those of ``but`` aside."""
        if self.checkpoint and (lost := self.patterns.keys() - self.masks.keys() - set(but)):
            raise FormatError(f"{self.checkpoint.folder}: says that {min(lost)} is sparse, but holds no mask of it")

    def quantized(self) -> dict[str, StoredCodes]:
        """Linear name -> its codes, left on disk, of the linears that are quantised."""
        if self.checkpoint is None or self.checkpoint.facts is None or not self.checkpoint.facts.schemes:
            return {}
        known, read = self.checkpoint.facts.schemes, self.checkpoint.quantized
        stored = {
            name.removesuffix(".weight"): tensor.removesuffix(".weight")
            for name, tensor in tensor_names(self.model, self.checkpoint).items()
        }
        return {
            name: StoredCodes(parse_scheme(known[owner]), partial(read, owner))
            for name, owner in stored.items()
            if owner in known
        }

    @property
    def max_seqlen(self) -> int | None:
        """The longest window the model's positions allow, or None if its config does not say."""
        longest: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return longest

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids lie below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of most of the weights."""
        dtypes: list[torch.dtype] = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return max(set(dtypes), key=dtypes.count)


def open_bundle(model: str) -> Bundle:
    """A bundle whose weights stay on disk.

    Args:
        model: Anything `resolve_model` takes.

    Raises: FormatError, UnsupportedModelError.
    """
    checkpoint = Checkpoint(resolve_model(model))
    return replace(bundle_of(checkpoint), tokenizer=load_tokenizer(checkpoint))


def bundle_of(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None = None, model: PreTrainedModel | None = None
) -> Bundle:
    """A bundle of an open checkpoint, whose weights stay on disk.

    Args:
        model: Its skeleton, if there is one already.

    Raises: FormatError, UnsupportedModelError.
    """
    model = model or skeleton(checkpoint)
    module = {n.removesuffix(".weight"): m.removesuffix(".weight") for m, n in tensor_names(model, checkpoint).items()}
    masks, patterns = checkpoint.masks(), checkpoint.facts.patterns if checkpoint.facts else {}
    if unknown := (masks.keys() | patterns.keys()) - module.keys():
        raise FormatError(f"{checkpoint.folder}: names {min(unknown)} as sparse, which {type(model).__name__} lacks")
    return Bundle(
        model,
        tokenizer,
        MaskStore({module[name]: masks.packed(name) for name in masks}),
        {module[name]: pattern for name, pattern in patterns.items()},
        checkpoint,
    )
