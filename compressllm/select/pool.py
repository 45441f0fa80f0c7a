"""Pool: records to choose from, and what two models make of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import CalibrationError, FormatError, RecipeError
from compressllm.core.protocols import Embedder
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle
from compressllm.models.shards import file_sha256
from compressllm.select.batches import in_batches
from compressllm.select.config import SelectConfig
from compressllm.select.divergence import response_divergence
from compressllm.select.encoding import encode
from compressllm.select.meanpool import TextEncoder
from compressllm.select.records import Record
from compressllm.select.vectorcache import content_key


class Pool:
    """Records as the dense model's tokenizer reads them. Models are loaded when they are first needed.

    Args:
        student: The pruned model; None if no divergence will be asked for.

    Raises: FormatError if there is no tokenizer; RecipeError if the two models cannot be compared.
    """

    def __init__(
        self, records: Sequence[Record], teacher: Bundle, student: Bundle | None, config: SelectConfig, run: Run
    ) -> None:
        if teacher.tokenizer is None:
            raise FormatError("the teacher holds no tokenizer, which the records are read with; give a model that does")
        if student is not None:
            _check_vocabularies(teacher, student)
        tokenizer = teacher.tokenizer
        self._teacher, self._student, self._tokenizer, self._run = teacher, student, tokenizer, run
        self._device = choose_device(config.device)
        self._dtype = choose_dtype(config.dtype, teacher.stored_dtype, self._device)
        self.prompts = [record.prompt for record in records]
        limit = min(config.max_tokens, teacher.max_seqlen or config.max_tokens)
        if limit < config.max_tokens:
            run.warn(
                f"the model reads at most {limit} tokens, fewer than max_tokens={config.max_tokens}; {limit} are used"
            )
        self.encoded = [
            encode(record, tokenizer, limit) for record in run.track(records, len(records), "reading records")
        ]
        self.lengths = torch.tensor([len(one.ids) for one in self.encoded])
        self.response_lengths = torch.tensor([len(one.ids) - one.start for one in self.encoded])
        self._known = torch.full((len(records), 2), torch.nan)

    def divergence(self, ids: Sequence[int]) -> Tensor:
        """As RecordPool says. Raises CalibrationError if a model's predictions are not numbers."""
        new = [one for one in dict.fromkeys(ids) if self._known[one, 0].isnan()]
        if new:
            self._known[new] = self._compared(new)
        return self._known[list(ids)]

    def embeddings(self, embedder: Embedder) -> Tensor:
        """As RecordPool says."""
        return embedder.embed(self.prompts, self._hidden, self._device, self._run)

    def _compared(self, ids: Sequence[int]) -> Tensor:
        encoded = [self.encoded[one] for one in ids]
        hashes = [_content(bundle) for bundle in (self._teacher, self._compared_with())]
        made = in_batches(
            lambda batch: response_divergence(self._dense, self._pruned, [encoded[item] for item in batch]),
            [len(one.ids) for one in encoded],
            [content_key(one.start, *one.ids) for one in encoded],
            2,
            None if None in hashes else ("divergence", *hashes, self._dtype),
            self._device,
            self._run,
            "comparing responses",
        )
        if not made.isfinite().all():
            wrong = int((~made.isfinite()).any(dim=1).sum())
            raise CalibrationError(
                f"the models' predictions of {wrong} of {len(ids)} responses are not finite; "
                "the pruned model is broken, or needs --dtype float32"
            )
        return made

    def _hidden(self, texts: Sequence[str]) -> Tensor:
        content = _content(self._teacher)
        identity = None if content is None else ("hidden", content, self._dtype)
        return TextEncoder(self._dense.base_model, self._tokenizer, identity, limit=256).encode(
            texts, self._device, self._run
        )

    @functools.cached_property
    def _dense(self) -> PreTrainedModel:
        return self._teacher.live(self._dtype, self._device)

    @functools.cached_property
    def _pruned(self) -> PreTrainedModel:
        return self._compared_with().live(self._dtype, self._device)

    def _compared_with(self) -> Bundle:
        if self._student is None:
            raise RecipeError(
                "this method compares the pruned model with the dense one; give the pruned one as student"
            )
        return self._student


@functools.cache
def _hashes(files: tuple[str, ...]) -> str:
    return " ".join(file_sha256(Path(file)) for file in files)


def _content(bundle: Bundle) -> str | None:
    """A hash of the weights; None for a model that is only in memory, of which nothing is kept."""
    return _hashes(tuple(map(str, bundle.checkpoint.files))) if bundle.checkpoint else None


def _check_vocabularies(teacher: Bundle, student: Bundle) -> None:
    if teacher.vocab_size != student.vocab_size:
        raise RecipeError(
            f"the teacher has {teacher.vocab_size} tokens and the student {student.vocab_size}; "
            "they can be compared only if one was pruned from the other"
        )
    if (
        teacher.tokenizer is not None
        and student.tokenizer is not None
        and teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab()
    ):
        raise RecipeError(
            "teacher and student have different tokenizers; they can be compared only if one was pruned from the other"
        )
