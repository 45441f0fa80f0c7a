"""The one sequential pass over decoder blocks that every calibrated method shares.

Each block sees what the blocks before it, already changed, put out. Inside a block all statistics are taken
in one forward, before anything in it changes.

Source: the block loop of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.calibration.activations import Activations
from compressllm.calibration.experts import eager_experts, experts_among
from compressllm.calibration.inputs import BlockInputs, Call, embed_windows, one_window
from compressllm.calibration.stepped import step_through
from compressllm.calibration.watch import InputWatch, Seen
from compressllm.core.errors import CalibrationError, UnsupportedModelError
from compressllm.core.halving import Halving
from compressllm.core.ranks import ALONE, Ranks
from compressllm.core.stats import InputStats, Need
from compressllm.models.blocks import DecoderBlocks, find_blocks, find_linears
from compressllm.models.linears import PrunableLinear
from compressllm.models.weights import Weights


@dataclass
class Block:
    """One decoder block of a walk, its weights real until the walk goes on.

    Args:
        index: Position, front to back.
        name: Module path.
        module: The block.
        linears: Name -> prunable linear.
        device: Where it runs.
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, PrunableLinear]
    device: torch.device
    _inputs: BlockInputs | None = field(repr=False)
    _ranks: Ranks = field(default=ALONE, repr=False)
    _targets: Mapping[str, Activations] = field(repr=False, default_factory=dict)
    stepped: bool = False
    """Whether the windows have gone through the changed block already."""

    @property
    def windows(self) -> int:
        """How many windows are sent through."""
        return self._inputs.windows if self._inputs is not None else 0

    def example(self, window: int, path: str = "") -> tuple[Tensor, Call, Tensor]:
        """What one window gives the block to learn: its input, how it is called, and what it should put out.

        All are copies in float32 on the block's device, fit for autograd; hidden states are (1, seqlen, hidden).

        Args:
            path: The submodule whose output is wanted, one of those `WalkOptions.tapped` named; itself if empty.
        """
        if self._inputs is None or path not in self._targets:
            raise ValueError(f"{self.name}: the walk was not asked for what {path or 'the block'} should put out")
        hidden, call = self._inputs.example(window)
        return hidden, call, one_window(self._targets[path], window).to(self.device)

    def outputs(self) -> Iterator[Tensor]:
        """Run the block on one batch of windows after another, as often as asked: (windows, seqlen, hidden) of each.

        The caller may have put hooks on it. Of several processes each runs its own windows.
        """
        for batch in range(len(self._inputs) if self._inputs is not None else 0):
            out = self._inputs.forward(self.module, self.name, batch) if self._inputs is not None else None
            if out is not None:
                yield out

    def sample(self) -> tuple[Tensor, Tensor]:
        """A few windows as the block is given them, and what it makes of them as it is now: (windows, seqlen, hidden).

        Raises: CalibrationError if the walk has no text.
        """
        if self._inputs is None:
            raise CalibrationError(f"{self.name}: the walk has no text")
        hidden, out = self._inputs.hidden(0), self._inputs.forward(self.module, self.name, 0)
        if out is None:
            raise ValueError(f"{self.name}: did not run to its end")
        return hidden, out

    def collect(self, needs: frozenset[Need]) -> dict[str, InputStats]:
        """Statistics of every linear's inputs, from one forward over all windows; of no token if nothing is needed.

        Each rank puts its own windows through the block, and all get the statistics of all windows. An expert of a
        mixture that too few tokens reached is given some of what all experts of the block saw; its statistics say so
        in ``pooled``.

        Raises: CalibrationError naming the linear that saw no token or a value that is not finite.
        """
        if not needs or self._inputs is None:
            return dict.fromkeys(self.linears, InputStats(tokens=0))
        inputs = self._inputs
        with InputWatch(self._modules(), needs, experts_among(self.linears.values())) as watch:

            def measure(batch: int) -> list[Seen]:
                return inputs.in_parts(
                    batch, lambda hidden: watch.measure(lambda: inputs.call(self.module, self.name, hidden))
                )

            for parts in inputs.each_batch(measure, rounds="hessian" in needs):  # products take all cores
                for seen in parts:
                    watch.merge_(seen)
        return watch.finish(self._ranks)

    def collect_in_turn(self, needs: frozenset[Need]) -> Iterator[dict[str, InputStats]]:
        """Statistics of one group of linears after another, each to be changed before the next is asked for.

        One forward pass serves all of it, and the windows on their way to the next block too; see `step_through`.
        Ask for all groups. If the walk was asked for what blocks should put out, they may be changed once more, and
        the windows go to the next block by another pass.

        Raises: UnsupportedModelError if the block does not call each of its linears once for all tokens;
            CalibrationError as `collect`, and if the windows do not fit into memory so.
        """
        inputs = self._inputs
        if not needs or inputs is None:
            yield dict.fromkeys(self.linears, InputStats(tokens=0))
            return
        with InputWatch(self._modules(), frozenset({"sqnorm"})) as watch:
            first = watch.measure(lambda: inputs.forward(self.module, self.name, 0))
            groups = watch.groups()
        if groups is None or len(self._modules()) < len(self.linears):  # experts are not called by all tokens
            raise UnsupportedModelError(
                f"{self.name}: does not call each of its linears once in a forward pass; use order parallel"
            )
        widest = max(totals.totals["sqnorm"].shape[0] for totals in first.totals.values())
        inputs.check_room(widest)

        def forward(batch: int) -> None:
            if (out := inputs.forward(self.module, self.name, batch)) is not None:
                inputs.put(batch, out)

        steps = step_through(self._modules(), groups, needs, forward, len(inputs), self._ranks)
        for _ in groups:
            yield next(steps)
        if self._targets:
            steps.close()  # the block's inputs are still wanted, so its outputs must not take their place
            return
        next(steps, None)
        self.stepped = True

    def _modules(self) -> dict[str, nn.Module]:
        """Name -> module, of the linears that are called as modules; experts are not."""
        return {name: linear.module for name, linear in self.linears.items() if linear.expert is None}


@dataclass(frozen=True)
class WalkOptions:
    """How a walk uses the machine. None of it changes what is computed, but for the last bits of sums.

    Args:
        device: Where the blocks run.
        batch_tokens: Tokens put through a block at once; None suits the device.
        memory_limit: Bytes of hidden states held in memory; more spill to disk.
        spill_folder: Where they spill to; None for the system's temporary folder.
        ranks: The processes whose windows are counted together.
        target: What a block should put out, if a caller wants to know: ``dense``, what it does in the unchanged
            model, of which a second stream of hidden states is kept; or ``block``, what it would make, unchanged, of
            what the changed blocks before it give it.
        tapped: Paths in a block of the submodules whose outputs are wanted too.
        warn: Told when the device runs out of memory, and batches are halved.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_tokens: int | None = None
    memory_limit: int = 4 << 30
    spill_folder: Path | None = None
    ranks: Ranks = ALONE
    target: Literal["dense", "block"] | None = None
    tapped: Callable[[nn.Module], Sequence[str]] = lambda block: ()
    warn: Callable[[str], None] = lambda message: None


def _batch_tokens(options: WalkOptions) -> int:
    # One batch a core: small ones stay in its cache. A GPU wants more work at once; how much is not measured.
    return options.batch_tokens or (1024 if options.device.type == "cpu" else 8192)


def walk_blocks(
    model: PreTrainedModel,
    windows: Tensor | None,
    weights: Weights,
    options: WalkOptions | None = None,
    start: int = 0,
) -> Iterator[Block]:
    """Yield the decoder blocks front to back; between two of them, send the windows through the changed block.

    Args:
        model: Its parameters may be on the meta device; ``weights`` makes them real one block at a time. It is in
            eval mode while it is walked, so that no dropout is in the statistics, and left in the mode it was in;
            experts of a mixture are computed eagerly, likewise.
        windows: (n, seqlen) token ids, this rank's share of them; or None for methods that look at no text: then
            nothing is computed.
        start: Index of the first block to yield. Earlier ones count as changed and are only sent through.

    Raises: CalibrationError, UnsupportedModelError.
    """
    options = options or WalkOptions()
    blocks = find_blocks(model)
    if start == len(blocks.modules):
        return
    training = model.training
    model.eval()
    try:
        with eager_experts(model):
            yield from _walk(model, blocks, windows, weights, options, start)
    finally:
        model.train(training)


def _walk(
    model: PreTrainedModel,
    blocks: DecoderBlocks,
    windows: Tensor | None,
    weights: Weights,
    options: WalkOptions,
    start: int,
) -> Iterator[Block]:
    inputs: BlockInputs | None = None
    if windows is not None:
        weights.load_outside_(blocks.prefix)
        inputs = embed_windows(
            model,
            blocks,
            windows,
            device=options.device,
            batch_windows=max(1, _batch_tokens(options) // windows.shape[1]),
            memory_limit=options.memory_limit // (3 if options.target else 1),  # inputs, targets, tapped ones
            spill_folder=options.spill_folder,
            halving=Halving(options.warn),
        )
        weights.release_outside_(blocks.prefix)
    dense = inputs.fork() if inputs is not None and options.target == "dense" else None
    for index, module in enumerate(blocks.modules):
        name = blocks.name(index)
        if index < start and inputs is None:
            continue
        if index < start and dense is not None:
            weights.load_original_(name)
            dense.advance(module, name)
            weights.release_(name)
        weights.load_(name)
        stepped = False
        if index >= start:
            targets: dict[str, Activations] = {}
            if inputs is not None and options.target:
                targets = (dense or inputs).outputs(module, name, options.tapped(module))
            if dense is not None:
                dense.replace_(targets[""])
            block = Block(
                index, name, module, find_linears(module, name), options.device, inputs, options.ranks, targets
            )
            yield block
            stepped = block.stepped
            targets.clear()  # the block may still be referred to
        if inputs is not None and stepped:
            inputs.next_block()
        elif inputs is not None and index + 1 < len(blocks.modules):
            inputs.advance(module, name)
        weights.release_(name)
