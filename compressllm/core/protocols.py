"""The protocols a method implements, and the registry of each. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from compressllm.core.pattern import Group, SparsityPattern
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.registry import REGISTRY_OF, Registry
from compressllm.core.run import Run
from compressllm.core.scheme import Scheme
from compressllm.core.stats import InputStats, Need

#: What text is wanted for: methods are fitted on one part, and measured on the other.
Split = Literal["calibration", "evaluation"]


class TextSource(Protocol):
    """Documents to calibrate or evaluate on."""

    def texts(self, split: Split) -> Iterator[str]:
        """Documents in their stored order. Raises CalibrationError if there are none to be had."""
        ...


@dataclass(frozen=True)
class Pruned:
    """One pruned weight.

    Args:
        keep: (out, in) bool, True = kept.
        weight: (out, in) float32, +0.0 wherever ``keep`` is False.
        notes: What the method has to say of this linear, as plain data for its row in the manifest.
        fallback: What it did instead of what was asked for, in one line, or None; warned of and recorded.
        pattern: What the mask obeys, if that is not the pattern asked for but the same in an order of inputs.
    """

    keep: Tensor
    weight: Tensor
    notes: Mapping[str, Any] = field(default_factory=dict)
    fallback: str | None = None
    pattern: SparsityPattern | None = None


class Pruner(Protocol):
    """Chooses which weights of one linear stay, and may change those that do.

    ``needs`` names the input statistics it reads; ``group`` is where unstructured scores compete unless the
    pattern says otherwise.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics it reads."""
        ...

    @property
    def group(self) -> Group:
        """Where unstructured scores compete."""
        ...

    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Prune an (out, in) float32 weight. Does not change its arguments."""
        ...


@dataclass(frozen=True)
class Quantized:
    """One quantised weight.

    Args:
        weight: Its codes and scales; code 0 wherever it is pruned.
        notes: What the method has to say of this linear, as plain data for its row in the manifest.
        fallback: What it did instead of what was asked for, in one line, or None; warned of and recorded.
    """

    weight: QuantizedWeight
    notes: Mapping[str, Any] = field(default_factory=dict)
    fallback: str | None = None


class Quantizer(Protocol):
    """Rounds the weights of one linear to a scheme's grid. Pruned weights stay exactly zero.

    ``needs`` names the input statistics it reads.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics it reads."""
        ...

    def quantize(self, weight: Tensor, keep: Tensor, stats: InputStats, scheme: Scheme) -> Quantized:
        """Quantise an (out, in) float32 weight, +0.0 wherever the (out, in) bool ``keep`` is False.

        Does not change its arguments. Raises: FormatError, CalibrationError.
        """
        ...


@dataclass(frozen=True)
class DenseLinear:
    """One linear before anything of the model is pruned.

    Args:
        read: Gives its (out, in) weight in float32, read anew at every call. Not to be changed.
        stats: Statistics of its inputs, those the method `needs`.
    """

    read: Callable[[], Tensor]
    stats: InputStats


#: One pass over the dense model, front to back: for each block its name and its linears, valid until the next block.
DensePass = Callable[[], Iterator[tuple[str, Mapping[str, DenseLinear]]]]


@dataclass(frozen=True)
class Allocation:
    """How a sparsity is spread over a model.

    Args:
        sparsity: Linear name -> fraction removed.
        notes: What it rests on, as plain data for the manifest.
    """

    sparsity: Mapping[str, float]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Allocator(Protocol):
    """Spreads an unstructured sparsity over the linears of a model, so that their weighted mean is what was asked."""

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics of the dense model it reads; without any, a pass computes nothing but reads weights."""
        ...

    def allocate(self, dense: DensePass, sizes: Mapping[str, int], sparsity: float) -> Allocation:
        """Linear name -> sparsity, of every linear in ``sizes``.

        Args:
            dense: Walks the dense model once at every call; not called by a method that looks at nothing.
            sizes: Linear name -> number of weights, front to back.
            sparsity: Fraction to remove of all of them together.
        """
        ...


class Format(Protocol):
    """How a pruned linear's weight lies on disk.

    ``tensors`` are the last parts of the names `pack` yields. The first holds the values, in the weight's dtype;
    a format of ``("weight",)`` alone is what any loader opens.
    """

    tensors: ClassVar[tuple[str, ...]]

    def layout(self, name: str, dtype: torch.dtype, keep: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensor name -> dtype and shape of what `pack` yields for a weight of ``dtype`` under this (out, in) mask."""
        ...

    def pack(self, name: str, weight: Tensor, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Named tensors that stand for the (out, in) ``weight`` of linear ``name``, +0.0 wherever ``keep`` is False."""
        ...

    def unpack(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor:
        """The (out, in) weight, bit for bit, from what `pack` wrote. Raises FormatError."""
        ...

    def mask(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor | None:
        """The (out, in) bool mask, or None if the format does not hold it. Raises FormatError."""
        ...


class Backend(Protocol):
    """Computes a linear from a packed weight, which may be a quantised one: a backend that cannot refuses it.

    ``rank`` orders backends by how fast they are where they run; ``auto`` takes the highest that does not refuse.
    """

    rank: ClassVar[int]

    @property
    def rounds_up_to(self) -> float:
        """Of how many tokens, at most, it rounds the inputs to 8 bits itself, beside integer weights; 0 if of none."""
        ...

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Why this backend cannot run this weight here, or None if it can.

        Args:
            wanted: It was asked for by name, so that being slow is no reason to refuse.
        """
        ...

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """The backend's own in-memory form of an (out, in) weight, zero wherever ``keep`` is False. Never saved."""
        ...

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight again, bit for bit; ``columns`` is in. Of a quantised one its codes times scales."""
        ...

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        ...


class Adapter(Protocol):
    """Trains a small share of a pruned model, such that what is merged keeps exactly the same zeros."""

    def attach_(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Freeze all but what is trained, which then are the parameters that require gradients. Changes ``model``.

        Args:
            masks: Linear name -> (out, in) bool mask.

        Raises: RecipeError, UnsupportedModelError, FormatError; nothing is changed then.
        """
        ...

    def merge_(self, model: nn.Module) -> None:
        """Leave the model with the modules it had, and what was trained in their weights. Changes ``model``."""
        ...


class Embedder(Protocol):
    """Turns texts into vectors whose cosine says how alike they are in meaning."""

    def refuses(self) -> str | None:
        """Why it cannot be used here and what to install, or None if it can."""
        ...

    def embed(
        self, texts: Sequence[str], hidden: Callable[[Sequence[str]], Tensor], device: torch.device, run: Run
    ) -> Tensor:
        """(n, d) float32 of unit rows, on the CPU.

        Args:
            hidden: (n, hidden size) mean hidden states of the texts in the dense model; not called by an embedder
                with a model of its own.
            device: Where to compute.
        """
        ...


class RecordPool(Protocol):
    """Records to choose from, and what is known of them, each worked out when it is first asked for."""

    prompts: list[str]
    """Text before the response."""
    lengths: Tensor
    """(n,) int64: tokens of prompt and response, as far as training would see them."""
    response_lengths: Tensor
    """(n,) int64: tokens of the response alone."""

    def divergence(self, ids: Sequence[int]) -> Tensor:
        """(len(ids), 2) float32: mean Jensen-Shannon divergence between the dense and the pruned model's predictions
        over the response tokens, and KL(dense || pruned). Raises RecipeError without a pruned model.
        """
        ...

    def embeddings(self, embedder: Embedder) -> Tensor:
        """(n, d) float32 unit vectors of the prompts."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Some records of a pool, in the order in which to use them.

    Args:
        ids: Their places in the pool.
        scores: What each was chosen for, higher first, as `notes` says.
        clusters: The cluster of each, or None if the method makes none.
        notes: What the choice rests on, as plain data for the report.
        labels: (n,) int64 cluster of every record of the pool, or None.
        coordinates: (n, c) where the clusters were found, or None.
    """

    ids: Sequence[int]
    scores: Sequence[float]
    clusters: Sequence[int] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    coordinates: Tensor | None = None


class Selector(Protocol):
    """Chooses the records that recovery training learns from."""

    @property
    def needs_student(self) -> bool:
        """Whether it compares the pruned model with the dense one."""
        ...

    def select(self, pool: RecordPool, budget: int, run: Run) -> Chosen:
        """Choose ``budget`` records, at most as many as there are. Raises RecipeError, CalibrationError."""
        ...


class BlockPass(Protocol):
    """One decoder block of the dense model, its weights real, and what calibration text gives it."""

    @property
    def name(self) -> str:
        """Module path."""
        ...

    @property
    def module(self) -> nn.Module:
        """The block."""
        ...

    def outputs(self) -> Iterator[Tensor]:
        """Run the block on one batch of windows after another: (windows, seqlen, hidden) of each."""
        ...


class NeuronSelector(Protocol):
    """Chooses what of a model the tokens that it drafts are computed with.

    ``level`` says which of the three protocols below an implementation is one of. What `fit` returns is kept beside
    the model and handed to every later call as ``fitted``.
    """

    level: ClassVar[Literal["prompt", "token", "input"]]

    @property
    def calibrated(self) -> bool:
        """Whether it has to look at text before it can be used."""
        ...

    def fit(self, blocks: Callable[[], Iterator[BlockPass]]) -> dict[str, Tensor]:
        """What it keeps of calibration text, for any density; empty if it looks at none.

        Args:
            blocks: Walks the dense model front to back at every call.
        """
        ...


@dataclass(frozen=True)
class PromptScores:
    """What one MLP's neurons scored on a prompt.

    Args:
        first: (neurons,) float32, over the first half of the prompt's tokens.
        total: Likewise over all of them.
        tokens: How many there were.
    """

    first: Tensor
    total: Tensor
    tokens: int


class PromptSelector(NeuronSelector, Protocol):
    """One set of neurons for all that follows a prompt: they are gathered once."""

    def score(self, h: Tensor) -> Tensor:
        """(neurons,) float32, a sum over the tokens of the (tokens, neurons) input of down."""
        ...

    def choose(
        self, scores: Sequence[PromptScores], counts: Sequence[int], fitted: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Of each MLP front to back (neurons,) float32: of which the ``counts`` largest are to be kept."""
        ...


class TokenSelector(NeuronSelector, Protocol):
    """A set of neurons for every token, chosen from its own activations."""

    @property
    def gated(self) -> bool:
        """Whether it looks at the gate's activation alone, so that up need not be computed where it says no."""
        ...

    def keep(self, values: Tensor, density: float, mlp: str, fitted: Mapping[str, Tensor]) -> Tensor:
        """(tokens, neurons) bool, from the gate's activations or from the input of down.

        Args:
            density: Fraction of neurons to keep.
            mlp: Module path of the MLP.
        """
        ...


class InputSelector(NeuronSelector, Protocol):
    """Leaves out small inputs of every linear of a block, attention's too: a set of inputs for every token."""

    def thresholds(self, density: float, fitted: Mapping[str, Tensor]) -> dict[str, float]:
        """Linear name -> magnitude up to which its inputs are left out.

        Args:
            density: Fraction of the blocks' weights to read.
        """
        ...


class Corrector(Protocol):
    """Says which drafted tokens stand, after the dense model has read them.

    ``period`` is how many tokens the dense model reads at once, ``width`` how many drafts are tried in parallel.
    """

    @property
    def period(self) -> int:
        """Tokens of one dense pass, the newest accepted one included."""
        ...

    @property
    def width(self) -> int:
        """Beams of the draft; 1 is a chain."""
        ...

    @property
    def exact(self) -> bool:
        """Whether what comes out is what the dense model alone would give.

        Tokens that are drawn are then accepted by chance, in place of `accepts`, so that their distribution is its own.
        """
        ...

    def accepts(self, drafted: Tensor, logits: Tensor, best: Tensor) -> Tensor:
        """(n,) bool: whether each drafted token would stand if all before it do.

        Args:
            drafted: (n,) token ids.
            logits: (n, vocabulary): what the dense model gives where each was drafted.
            best: (n,) token ids the dense model would take there.
        """
        ...


SOURCES: Registry[TextSource] = Registry("text source", "compressllm.calibration")
PRUNERS: Registry[Pruner] = Registry("pruner", "compressllm.prune")
ALLOCATORS: Registry[Allocator] = Registry("allocator", "compressllm.prune")
FORMATS: Registry[Format] = Registry("format", "compressllm.export")
BACKENDS: Registry[Backend] = Registry("backend", "compressllm.kernels")
ADAPTERS: Registry[Adapter] = Registry("adapter", "compressllm.recover.adapters")
QUANTIZERS: Registry[Quantizer] = Registry("quantizer", "compressllm.quantize")
SELECTORS: Registry[Selector] = Registry("selector", "compressllm.select")
EMBEDDERS: Registry[Embedder] = Registry("embedder", "compressllm.select.embedders")
NEURON_SELECTORS: Registry[NeuronSelector] = Registry("neuron selector", "compressllm.contextual")
CORRECTORS: Registry[Corrector] = Registry("corrector", "compressllm.contextual")

REGISTRY_OF.update({TextSource: SOURCES, Pruner: PRUNERS, Allocator: ALLOCATORS, Format: FORMATS, Backend: BACKENDS})
REGISTRY_OF.update({Adapter: ADAPTERS, Quantizer: QUANTIZERS, Selector: SELECTORS, Embedder: EMBEDDERS})
REGISTRY_OF.update({NeuronSelector: NEURON_SELECTORS, Corrector: CORRECTORS})

#: The registries by the name ``compressllm list`` takes.
REGISTRIES: dict[str, Registry[Any]] = {
    "adapters": ADAPTERS,
    "allocators": ALLOCATORS,
    "backends": BACKENDS,
    "correctors": CORRECTORS,
    "embedders": EMBEDDERS,
    "formats": FORMATS,
    "neuron-selectors": NEURON_SELECTORS,
    "pruners": PRUNERS,
    "quantizers": QUANTIZERS,
    "selectors": SELECTORS,
    "sources": SOURCES,
}
