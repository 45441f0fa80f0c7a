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
from compressllm.calibration.inputs import BlockInputs, Call, embed_windows, one_window
from compressllm.calibration.watch import InputWatch, Totals
from compressllm.core.stats import InputStats, Need
from compressllm.models.blocks import DecoderBlocks, find_blocks, find_linears
from compressllm.models.weights import Weights


@dataclass
class Block:
    """One decoder block of a walk, its weights real until the walk goes on.

    Args:
        index: Position, front to back.
        name: Module path.
        module: The block.
        linears: Full module path -> prunable linear.
        device: Where it runs.
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    device: torch.device
    _inputs: BlockInputs | None = field(repr=False)
    _targets: Mapping[str, Activations] = field(repr=False, default_factory=dict)

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

    def collect(self, needs: frozenset[Need]) -> dict[str, InputStats]:
        """Statistics of every linear's inputs, from one forward over all windows; of no token if nothing is needed.

        Raises: CalibrationError naming the linear that saw no token or a value that is not finite.
        """
        if not needs or self._inputs is None:
            return dict.fromkeys(self.linears, InputStats(tokens=0))
        inputs = self._inputs
        with InputWatch(self.linears, needs) as watch:

            def measure(batch: int) -> Totals:
                return watch.measure(lambda: inputs.forward(self.module, self.name, batch))

            for totals in inputs.each_batch(measure):
                watch.merge_(totals)
        return watch.finish()


@dataclass(frozen=True)
class WalkOptions:
    """How a walk uses the machine. None of it changes what is computed, but for the last bits of sums.

    Args:
        device: Where the blocks run.
        batch_tokens: Tokens put through a block at once; None suits the device.
        memory_limit: Bytes of hidden states held in memory; more spill to disk.
        spill_folder: Where they spill to; None for the system's temporary folder.
        target: What a block should put out, if a caller wants to know: ``dense``, what it does in the unchanged
            model, of which a second stream of hidden states is kept; or ``block``, what it would make, unchanged, of
            what the changed blocks before it give it.
        tapped: Paths in a block of the submodules whose outputs are wanted too.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_tokens: int | None = None
    memory_limit: int = 4 << 30
    spill_folder: Path | None = None
    target: Literal["dense", "block"] | None = None
    tapped: Callable[[nn.Module], Sequence[str]] = lambda block: ()


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
            eval mode while it is walked, so that no dropout is in the statistics, and left in the mode it was in.
        windows: (n, seqlen) token ids, or None for methods that look at no text: then nothing is computed.
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
        if index >= start:
            targets: dict[str, Activations] = {}
            if inputs is not None and options.target:
                targets = (dense or inputs).outputs(module, name, options.tapped(module))
            if dense is not None:
                dense.replace_(targets[""])
            yield Block(index, name, module, find_linears(module, name), options.device, inputs, targets)
            targets.clear()  # the block may still be referred to
        if inputs is not None and index + 1 < len(blocks.modules):
            inputs.advance(module, name)
        weights.release_(name)
