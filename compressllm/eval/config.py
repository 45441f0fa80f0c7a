"""Settings of the eval stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from compressllm.core.config import Config, Device, Dtype, name_in
from compressllm.core.protocols import BACKENDS


class EvalConfig(Config):
    """Measure perplexity, accuracy on tasks, and agreement with the dense parent."""

    source: str | dict[str, dict[str, Any] | None] | None = None
    """A name from `compressllm list sources`, a text file, or a .npy file of token ids. Unless given it is builtin, or
    no text at all if there are tasks and no parent."""
    seqlen: int | None = Field(default=None, ge=2)
    """Tokens in a window; the smaller of 1024 and what the model allows, unless the source is token ids."""
    windows: int | None = Field(default=None, ge=1)
    """At most this many windows, from the start of the text; all of it unless given."""
    parent: str | None = None
    """The dense model; how often the two choose the same next token is measured too."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, whose package is an extra."""
    task_files: tuple[str, ...] = ()
    """Folders with NAME.jsonl or NAME.jsonl.gz for each task, or NAME=FILE; the items come from there, not the hub."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Worked examples before each item; the task's own number unless given."""
    limit: float | None = Field(default=None, gt=0)
    """Only the first so many items of each task; below 1, that share of them."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Items in one forward on tasks, or auto."""
    apply_chat_template: bool = False
    """Put each item into the tokenizer's chat template."""
    dtype: Dtype = "auto"
    """Dtype the model computes in; the loss is always float32."""
    device: Device = "auto"
    """Where the model runs."""
    backend: name_in(BACKENDS, "auto") = "auto"  # type: ignore[valid-type]
    """Kernel backend of sparse linears, from `compressllm list backends`, or auto for the fastest."""
    keep_dense: bool = False
    """Let auto keep a dense copy of a linear beside its packed form, for prompts, where that is faster."""

    @property
    def text(self) -> str | dict[str, dict[str, Any] | None] | None:
        """The source of text to measure on, or None."""
        return self.source or (None if self.tasks and not self.parent else "builtin")
