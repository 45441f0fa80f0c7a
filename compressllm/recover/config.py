"""Settings of the recover stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from compressllm.core.config import Config, Device, Pattern
from compressllm.core.errors import CompressError
from compressllm.core.protocols import ADAPTERS
from compressllm.core.registry import Spec, build
from compressllm.core.scheme import SchemeName, parse_scheme
from compressllm.recover.losses import LossWeights
from compressllm.recover.records import RecordConfig
from compressllm.recover.schedules import learning_rate

T = TypeVar("T")

#: A text source, as `open_source` takes it.
Source = str | dict[str, dict[str, Any] | None]


class SlorbConfig(Config):
    """Branches beside masked linears while they are trained."""

    block: int = Field(default=16, ge=1)
    """Inputs that share a column."""
    projected: bool = True
    """Train both factors of a branch, not only the outer one."""
    export: Literal["forbid", "drop", "merge"] = "forbid"
    """What becomes of the branches, which no checkpoint with the masks' zeros can hold: drop leaves them out, merge
    adds them to the weights, which are dense then."""


class RecoverConfig(Config):
    """Train a pruned model back towards its dense teacher, under its masks."""

    teacher: str | None = None
    """The dense model to distil from: hub id, folder, .gguf file, run folder or demo. None trains on the text alone."""
    data: tuple[Source, ...] = ("builtin",)
    """Text to train on: names from `compressllm list sources`, or files. Their calibration part is taken."""
    mixture: tuple[float, ...] = ()
    """Share of the tokens each source gives, in their order; in proportion to their length unless given."""
    records: tuple[str, ...] = ()
    """JSON lines of prompts and responses to train on in place of text; only responses count in the loss."""
    record: RecordConfig = RecordConfig()
    """How those are read."""
    held_out: float = Field(default=0.02, gt=0, lt=0.5)
    """Share of the training windows that is not trained on: it chooses the best checkpoint and tells divergence.
    Fewer, where looking at them would take more than a tenth of the time."""
    seqlen: int = Field(default=512, ge=2)
    """Tokens in a window."""
    max_tokens: int = Field(default=500_000, ge=1)
    """Tokens to train on, rounded up to whole steps."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens in an optimizer step, rounded up to whole windows; over all processes together."""
    micro_batch: int = Field(default=2, ge=1)
    """Windows in one forward of one process."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls after that."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak it falls to; over the last steps it goes on to zero."""
    cooldown: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which it falls from the floor to zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's averages of the gradient and of its square."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of kept weights of matrices."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None leaves it."""
    losses: str = "kl=1.0"
    """Weights of the losses ce, kl, reverse_kl and squarehead, as in kl=1.0,squarehead=0.5."""
    paper_exact: bool = False
    """Compute squarehead as its authors' code does: summed over blocks, with an epsilon that hides quiet ones."""
    teacher_cache: int | None = Field(default=None, ge=1)
    """Have the teacher answer all windows once, and keep its most likely so many tokens on disk; None asks it anew."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the distillation losses."""
    masking: Literal["fixed", "ast", "deferred", "gradual", "mask-decay", "structure-decay", "none"] = "fixed"
    """Whether masks stay (fixed), move while pruned weights decay (ast), or act in the optimizer only (deferred). Of a
    dense student: prune more and more (gradual), shrink what is pruned in the forward pass (mask-decay), or go through
    patterns that prune less (structure-decay); or have no masks (none), say to make a teacher that knows the text."""
    pattern: Pattern | None = None
    """What a dense student is trained to, whose first masks are by size; a pruned one is checked against it."""
    skip: tuple[str, ...] = ()
    """Globs of linears that stay dense, of a dense student."""
    decay: Literal["annealed", "static", "reversed", "none"] = "annealed"
    """Of pruned weights under ast: rising to its full strength, at it from the start; experiments: with the wrong sign,
    or none."""
    decay_strength: float | None = Field(default=None, ge=0)
    """Full strength of that decay; 1e-4 under ast and 4e-7 under deferred unless given. Under mask-decay its rate a
    step; what leaves a hundredth by the time that masks are frozen unless given."""
    decay_shape: Literal["exponential", "linear"] = "exponential"
    """Of mask-decay."""
    structure: Literal["stepwise", "geometric", "densify"] = "stepwise"
    """The way of structure-decay to 2:4: by 3:4; by 16:32, 8:16 and 4:8; or by 2:32, 2:16 and 2:8."""
    scales: int = Field(default=2, ge=0)
    """Under deferred, equal parts of each row that get a learnt scale, folded in at the end; 0 for none."""
    ramp: float = Field(default=0.25, gt=0, le=1)
    """Share of the steps over which annealed decay rises."""
    refresh: int = Field(default=10, ge=1)
    """Steps between two choices of the masks, where they move."""
    freeze: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps, the last ones, in which masks do not move any more."""
    quantize: SchemeName | None = None
    """Train with weights rounded to a scheme, int4-g128 say, and straight-through gradients; quantize with rtn and the
    same scheme makes of the result what was trained."""
    train: str | dict[str, dict[str, Any] | None] = "all"
    """What trains: all parameters, or an adapter from `compressllm list adapters`, or {name: {option: value}}."""
    frozen: tuple[str, ...] = ()
    """Globs of parameters that stay as they are, under train: all; *embed_tokens* spares its gradient and moments."""
    slorb: SlorbConfig | None = None
    """Train with dense low-rank branches beside the masked linears; see its `export`."""
    activation_checkpointing: bool = False
    """Compute a block's activations again in the backward pass instead of keeping them."""
    sharding: Literal["replicated", "fsdp2"] = "replicated"
    """With several processes: whether each holds the whole model, or a share of every tensor."""
    evaluate_every: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps between two looks at the held-out windows."""
    save_every: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps between two checkpoints, from which a killed run goes on; 1 makes none."""
    diverged: float = Field(default=2.0, gt=0)
    """Nats by which the held-out loss may rise over its best before training is given up."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the student's and the teacher's matrix products; auto is bfloat16 on CUDA and on CPUs that have
    units for it (AMX, AVX512-BF16), else float32.
    The optimizer's weights are float32 in any case."""
    device: Device = "auto"
    """Where training runs."""

    @field_validator("train")
    @classmethod
    def _adapter(cls, spec: Spec) -> Spec:
        if spec != "all":
            _or_value_error(lambda: build(ADAPTERS, spec))
        return spec

    @field_validator("losses")
    @classmethod
    def _losses(cls, text: str) -> str:
        return str(_or_value_error(lambda: LossWeights.parse(text)))

    @model_validator(mode="after")
    def _consistent(self) -> RecoverConfig:
        if self.mixture and len(self.mixture) != len(self.data):
            raise ValueError(f"mixture has {len(self.mixture)} shares for {len(self.data)} sources")
        if self.warmup + self.cooldown >= 1:
            raise ValueError(f"warmup {self.warmup:g} and cooldown {self.cooldown:g} leave no step between them")
        if self.masking not in ("fixed", "none") and self.train != "all":
            raise ValueError(f"train: {self.train} holds masks as they are; masking {self.masking} needs train: all")
        if self.masking == "none" and (self.pattern is not None or self.slorb or self.train != "all"):
            raise ValueError("masking none: trains a dense model as it is; leave pattern, slorb and train out")
        if self.quantize is not None:
            whole = self.train == "all" and not self.slorb and self.sharding == "replicated"
            if self.masking not in ("fixed", "none") or not whole:
                raise ValueError(
                    "quantize: rounds whole weights under masks that stay; leave masking, train, slorb and sharding out"
                )
            if parse_scheme(self.quantize).dynamic:
                raise ValueError(f"quantize: {self.quantize} is trained by its weights alone; give it without -dynamic")
        if self.slorb and (self.train != "all" or self.sharding != "replicated"):
            raise ValueError("slorb: its branches train beside whole weights; leave train and sharding out")
        if self.train != "all" and self.frozen:
            raise ValueError(f"train: {self.train} says what trains; leave frozen out")
        if self.train != "all" and self.sharding != "replicated":
            raise ValueError(f"train: {self.train} is small enough to be replicated; leave sharding out")
        if self.teacher is None and self.loss_weights.need_teacher:
            raise ValueError(f"losses {self.losses} need a teacher; give one, or train with ce=1.0 alone")
        return self

    @property
    def loss_weights(self) -> LossWeights:
        """How much each loss counts."""
        return LossWeights.parse(self.losses)

    @property
    def windows_per_step(self) -> int:
        """Windows in an optimizer step, over all processes."""
        return -(-self.batch_tokens // self.seqlen)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.max_tokens // (self.windows_per_step * self.seqlen))

    @property
    def strength(self) -> float:
        """Full strength of the decay of pruned weights."""
        if self.decay_strength is not None:
            return self.decay_strength
        return 4e-7 if self.masking == "deferred" else 1e-4


def rate_of(step: int, config: RecoverConfig) -> float:
    """The learning rate of a step, from 0."""
    return learning_rate(
        step,
        config.steps,
        config.lr,
        warmup=config.warmup,
        shape=config.schedule,
        floor=config.floor,
        cooldown=config.cooldown,
    )


def _or_value_error(make: Callable[[], T]) -> T:
    """What pydantic reports in place of our own error."""
    try:
        return make()
    except CompressError as error:
        raise ValueError(str(error)) from None
