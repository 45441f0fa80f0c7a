"""What the decoder blocks are called with: hidden states, and the other arguments of each block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from compressllm.calibration.activations import Activations
from compressllm.core.errors import CalibrationError, UnsupportedModelError
from compressllm.core.halving import Halving
from compressllm.core.parallel import map_batches
from compressllm.models.blocks import DecoderBlocks

R = TypeVar("R")


class Enough(Exception):
    """Raised inside a forward pass once nothing further in it is needed."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block, hidden states left out.

    Args:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
        keyword: Whether the hidden states are passed as ``hidden_states=``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool

    def run(self, module: nn.Module, hidden: Tensor) -> Any:
        """Call ``module`` the way the model would."""
        if self.keyword:
            return module(*self.args, hidden_states=hidden, **self.kwargs)
        return module(hidden, *self.args, **self.kwargs)

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Call(tree_map(move, self.args), tree_map(move, self.kwargs), self.keyword)

    def copy(self) -> Call:
        """The same call with copies of its tensors, floats in float32: outside inference mode fit for autograd."""

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()

        return Call(tree_map(copied, self.args), tree_map(copied, self.kwargs), self.keyword)

    def same_as(self, other: Call) -> bool:
        """Whether both pass equal arguments."""
        mine, form = tree_flatten((self.args, self.kwargs))
        theirs, other_form = tree_flatten((other.args, other.kwargs))
        return form == other_form and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
            for a, b in zip(mine, theirs, strict=True)
        )


class Tap:
    """Catches what one submodule gives back while it is entered, in every thread its own.

    Args:
        module: The submodule.
        last: Raise `Enough` once it has run.
    """

    def __init__(self, module: nn.Module, last: bool = False) -> None:
        self._module, self._last = module, last
        self._caught = threading.local()

    def __enter__(self) -> Tap:
        self._handle = self._module.register_forward_hook(self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def take(self) -> Any:
        """What was caught last in this thread; None if nothing was."""
        caught, self._caught.output = getattr(self._caught, "output", None), None
        return caught

    def _catch(self, module: nn.Module, args: Any, output: Any) -> None:
        self._caught.output = output
        if self._last:
            raise Enough


def hidden_states(result: Any, like: Tensor, name: str) -> Tensor:
    """The hidden states in what the module ``name`` gave back.

    Raises: UnsupportedModelError if there are none of the shape and dtype of ``like``.
    """
    out = result[0] if isinstance(result, tuple) else result
    if not isinstance(out, Tensor) or out.shape != like.shape or out.dtype != like.dtype:
        raise UnsupportedModelError(f"{name}: gave back {type(out).__name__}, not hidden states like its input's")
    return out


def one_window(hidden: Activations, window: int) -> Tensor:
    """One window's (1, seqlen, hidden) states as a float32 copy, on the CPU."""
    batch, row = divmod(window, hidden.shape(0)[0])  # only the last batch may be shorter
    return hidden[batch][row : row + 1].to(torch.float32, copy=True)


class BlockInputs:
    """Hidden states of all windows on their way through the blocks.

    Args:
        hidden: One tensor of (windows, seqlen, hidden) per batch: the inputs of the current block.
        calls: Windows in a batch -> the call of each block. Windows are of one length and unpadded, so what a
            block is called with does not depend on their content.
        device: Where blocks run.
        memory_limit: Bytes of activations to be held in memory at most.
        halving: Cuts batches that the device has no memory for.
    """

    def __init__(
        self,
        hidden: Activations,
        calls: dict[int, list[Call]],
        device: torch.device,
        memory_limit: int,
        halving: Halving,
    ) -> None:
        self._hidden, self._calls, self._device = hidden, calls, device
        self._memory_limit, self._halving = memory_limit, halving
        self._block = 0

    def fork(self) -> BlockInputs:
        """The same hidden states, to be sent on their own way."""
        hidden = self._hidden.empty_like()
        for batch in range(len(hidden)):
            hidden[batch] = self._hidden[batch]
        return BlockInputs(hidden, self._calls, self._device, self._memory_limit, self._halving)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return sum(self._hidden.shape(batch)[0] for batch in range(len(self._hidden)))

    def example(self, window: int) -> tuple[Tensor, Call]:
        """One window's (1, seqlen, hidden) input of the current block and how it is called, as float32 copies."""
        return one_window(self._hidden, window).to(self._device), self._calls[1][self._block].copy()

    def each_batch(self, work: Callable[[int], R], *, rounds: bool = False) -> Iterator[R]:
        """Yield what ``work`` makes of every batch, in order; see `map_batches`."""
        return map_batches(work, len(self._hidden), self._device, rounds=rounds)

    def in_parts(self, batch: int, work: Callable[[Tensor], R]) -> list[R]:
        """What ``work`` makes of one batch's inputs, or of parts of them where the device has no memory for all."""
        return self._halving.run(work, self.hidden(batch), self._calls)

    def forward(self, module: nn.Module, name: str, batch: int) -> Tensor | None:
        """The current block's output for one batch, or None if something in it raised `Enough`.

        Raises: UnsupportedModelError if the block does not give back hidden states.
        """
        parts = self.in_parts(batch, lambda hidden: self.call(module, name, hidden))
        made = [part for part in parts if part is not None]
        if not made:
            return None
        return made[0] if len(made) == 1 else torch.cat(made)

    def hidden(self, batch: int) -> Tensor:
        """(windows, seqlen, hidden) inputs of the current block, on the device it runs on."""
        return self._hidden[batch].to(self._device)

    def call(self, module: nn.Module, name: str, hidden: Tensor) -> Tensor | None:
        """As `forward`, of hidden states in place of a batch's own."""
        try:
            with torch.inference_mode():
                result = self._calls[hidden.shape[0]][self._block].run(module, hidden)
        except Enough:
            return None
        return hidden_states(result, hidden, name)

    def outputs(self, module: nn.Module, name: str, tapped: Sequence[str] = ()) -> dict[str, Activations]:
        """What the current block, under ``""``, and the submodules of it at these paths put out for every batch."""
        made = {path: self._hidden.empty_like() for path in ("", *tapped)}
        taps = {path: Tap(module.get_submodule(path)) for path in tapped}

        def note(batch: int) -> None:
            out = self.forward(module, name, batch)
            if out is not None:
                made[""][batch] = out
            for path, tap in taps.items():
                made[path][batch] = hidden_states(tap.take(), self._hidden[batch], f"{name}.{path}")

        with ExitStack() as stack:
            for tap in taps.values():
                stack.enter_context(tap)
            for _ in self.each_batch(note):
                pass
        return made

    def replace_(self, outputs: Activations) -> None:
        """Move on to the next block, whose inputs are these outputs of the current one."""
        self._hidden = outputs
        self._block += 1

    def advance(self, module: nn.Module, name: str) -> None:
        """Put every batch through the current block and move on to the next."""

        def replace(batch: int) -> None:
            out = self.forward(module, name, batch)
            if out is not None:
                self.put(batch, out)

        for _ in self.each_batch(replace):
            pass
        self.next_block()

    def put(self, batch: int, out: Tensor) -> None:
        """Let the current block's output for one batch take the place of its input."""
        self._hidden[batch] = out

    def next_block(self) -> None:
        """All batches hold the current block's outputs: the next block is the current one."""
        self._block += 1

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._hidden)

    def check_room(self, widest: int) -> None:
        """Find out whether all batches may be within a block at once.

        Args:
            widest: The most inputs that a linear of the block has.

        Raises: CalibrationError if not.
        """
        # On its way a batch holds the residual stream, up to three projections as wide, or one inner activation.
        needed = int(self._hidden.bytes * (3 + widest / self._hidden[0].shape[-1]))
        if needed > self._memory_limit:
            raise CalibrationError(
                f"order sequential holds about {needed / 1e9:.1f} GB of activations, {self._memory_limit / 1e9:.1f} GB "
                "are allowed; raise activation_memory_gb, give fewer or shorter windows, or use order parallel"
            )


def embed_windows(
    model: PreTrainedModel,
    blocks: DecoderBlocks,
    windows: Tensor,
    *,
    device: torch.device,
    batch_windows: int,
    memory_limit: int,
    spill_folder: Path | None,
    halving: Halving | None = None,
) -> BlockInputs:
    """Run everything before the first block, and record how each block is called.

    The blocks themselves are not run, so they may be on the meta device.

    Args:
        windows: (n, seqlen) token ids.
        batch_windows: Windows in a batch.
        halving: Cuts batches that the device has no memory for, to halves, quarters and so on.

    Raises: CalibrationError if there is no window or a token id is outside the vocabulary; UnsupportedModelError if
        blocks are called differently for different text.
    """
    if not len(windows):
        raise CalibrationError("no calibration window was given")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
        raise CalibrationError(
            f"calibration token ids run from {int(windows.min())} to {int(windows.max())}, "
            f"the model's vocabulary has {vocabulary}; were they made with another tokenizer?"
        )
    calls: dict[int, list[Call]] = {}
    batches = torch.split(windows, batch_windows)
    shown, calls[1] = _record(model, blocks, batches[0][:1].to(device))
    shapes = [(len(batch), *shown.shape[1:]) for batch in batches]
    hidden = Activations(shapes, shown.dtype, memory_limit, spill_folder)
    for index, ids in enumerate(batches):
        hidden[index], recorded = _record(model, blocks, ids.to(device))
        before = calls.setdefault(len(ids), recorded)
        if not all(mine.same_as(theirs) for mine, theirs in zip(before, recorded, strict=True)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: calls its blocks differently for different text, which is not supported"
            )
    size = batch_windows // 2
    while size > 1 and len(batches[0]) > size:
        calls.setdefault(size, _record(model, blocks, batches[0][:size].to(device))[1])
        size //= 2
    on_device = {size: [call.to(device) for call in made] for size, made in calls.items()}
    return BlockInputs(hidden, on_device, device, memory_limit, halving or Halving())


class _Echo(Tensor):
    """Stands for a block's result in models that take it whole and in models that take its first element."""

    def __getitem__(self, key: Any) -> Any:
        return self if key == 0 else super().__getitem__(key)


def _record(model: PreTrainedModel, blocks: DecoderBlocks, ids: Tensor) -> tuple[Tensor, list[Call]]:
    """The first block's input, and the call of every block, with stubs in the blocks' places."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def stub(*args: Any, **kwargs: Any) -> Tensor:
        keyword = "hidden_states" in kwargs
        hidden: Tensor = kwargs.pop("hidden_states") if keyword else args[0]
        calls.append(Call(args if keyword else args[1:], kwargs, keyword))
        if not first:
            first.append(hidden)
        if len(calls) == len(blocks.modules):
            raise Enough
        return hidden.as_subclass(_Echo)

    with _in_place_of(blocks, stub), contextlib.suppress(Enough), torch.inference_mode():
        model.base_model(input_ids=ids, use_cache=False)
    if len(calls) != len(blocks.modules):
        raise UnsupportedModelError(f"{type(model).__name__}: called {len(calls)} of its {len(blocks.modules)} blocks")
    return first[0], calls


def finish_windows(model: PreTrainedModel, blocks: DecoderBlocks, ids: Tensor, hidden: Tensor) -> Tensor:
    """(windows, seqlen, vocabulary) logits that the model makes of what its last block put out.

    The blocks themselves are not run, so they may be on the meta device.

    Args:
        ids: (windows, seqlen) token ids.
        hidden: (windows, seqlen, hidden).
    """

    def stub(*args: Any, **kwargs: Any) -> Tensor:
        return hidden.as_subclass(_Echo)

    with _in_place_of(blocks, stub), torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.as_subclass(Tensor)


@contextlib.contextmanager
def _in_place_of(blocks: DecoderBlocks, stub: Callable[..., Tensor]) -> Iterator[None]:
    """Have ``stub`` called in the place of every block."""
    modules: Sequence[nn.Module] = list(blocks.modules)
    own = [vars(module).get("forward") for module in modules]  # accelerate puts one on modules that it moves
    for module in modules:
        module.forward = stub
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward  # the class's shows again
            if forward is not None:
                module.forward = forward
