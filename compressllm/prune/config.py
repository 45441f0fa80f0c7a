"""Settings of the prune stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from compressllm.calibration.config import CalibrationConfig
from compressllm.core.config import Config, Device, Dtype, Pattern, PatternOrDense, method_of
from compressllm.core.pattern import NM
from compressllm.core.protocols import ALLOCATORS, PRUNERS
from compressllm.core.registry import build

#: A fraction below one.
Unit = Annotated[float, Field(ge=0, lt=1)]


class ReconstructConfig(Config):
    """Train the weights that stay, block by block, towards the dense outputs."""

    unit: Literal["block", "sublayer"] = "block"
    """What is trained at once: a whole block, or its attention and then the rest of it."""
    target: Literal["dense", "block"] = "dense"
    """What to come near to: the output at this depth of the dense model, or of the dense block on pruned inputs."""
    loss: Literal["token", "mse"] = "token"
    """Squared error over each token's own squared target, or over their mean."""
    epochs: int = Field(default=5, ge=1)
    """Passes over the calibration windows."""
    batch: int = Field(default=8, ge=1)
    """Windows in a step."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Adam's largest step, as a fraction of the root mean square of the tensor."""
    betas: tuple[Unit, Unit] = (0.9, 0.95)
    """Adam's averages of the gradient and of its square."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; then it falls to zero as half a cosine."""
    norms: bool = False
    """Train norms and biases too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products while training; weights are in float32 in any case."""


def _switch(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


#: Settings, or a plain true or false for the defaults or none.
Reconstruct = Annotated[ReconstructConfig | None, BeforeValidator(_switch)]


def _scores(spec: Any) -> Any:
    if not callable(getattr(build(PRUNERS, spec), "score", None)):
        raise ValueError(f"{spec!r} does not score weights one by one; give magnitude, wanda or another criterion")
    return spec


#: A pruner that scores each weight.
Criterion: Any = Annotated[method_of(PRUNERS), AfterValidator(_scores)]


class GatherConfig(Config):
    """Give each linear an order of inputs of its own; a kernel for N:M then gathers its inputs at every call."""

    score: Criterion = "wanda"
    """What counts as kept: a pruner that scores each weight, as magnitude, wanda or ria do."""
    only: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Globs of the linears that gather, as in '*.down_proj'."""
    rounds: int = Field(default=100, ge=0)
    """Search effort: rounds of exchanges for each order, at most."""
    rows: int = Field(default=16384, ge=1)
    """Rows of scores looked at for each order; of more, a random sample."""


#: Settings, or a plain true or false for the defaults or none.
Gather = Annotated[GatherConfig | None, BeforeValidator(_switch)]


class PruneConfig(Config):
    """Prune a checkpoint in one shot."""

    method: method_of(PRUNERS) = "wanda"  # type: ignore[valid-type]
    """How weights are chosen: a name from `compressllm list pruners`, or {name: {option: value}}."""
    pattern: Pattern = NM(2, 4)
    """What stays: N:M as in 2:4 (keep 2 of every 4), or the fraction removed as in 0.5, 0.5/row, 0.5/layer."""
    masks: str | None = None
    """A pruned checkpoint whose masks a refiner starts from, in place of its initial pruner's; their pattern stays."""
    allocation: method_of(ALLOCATORS) = "uniform"  # type: ignore[valid-type]
    """How a fraction is spread over the linears: a name from `compressllm list allocators`, or with its options."""
    patterns: dict[str, PatternOrDense] = Field(default_factory=dict)
    """Patterns of single linears by glob, the first that matches: {'*.down_proj': '4:8', 'model.layers.0.*': dense}."""
    skip: tuple[str, ...] = ()
    """Globs of linears to leave dense, as in '*.o_proj' or 'model.layers.0.*'."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text the method looks at, if it looks at any."""
    order: Literal["parallel", "sequential"] = "parallel"
    """Whether a block's linears are calibrated on its dense siblings, or in turn on those pruned before them."""
    gather: Gather = None
    """Prune N:M in an order of each linear's own, in which its inputs are gathered: true, or a mapping of settings."""
    reconstruct: Reconstruct = None
    """Train what stays of each block towards the dense outputs: true, or a mapping of settings."""
    dtype: Dtype = "auto"
    """Dtype of the forward passes; what is stored keeps its own. A model already in memory keeps its dtype."""
    device: Device = "auto"
    """Where the forward passes run. A model already in memory stays where it is."""
    activation_memory_gb: float = Field(default=4.0, ge=0)
    """Hidden states held in memory; more spill to disk."""

    @model_validator(mode="after")
    def _gathers_groups(self) -> PruneConfig:
        if self.gather and self.masks:
            raise ValueError("masks have their order already; give gather, or masks")
        if self.gather and not any(isinstance(one, NM) for one in (self.pattern, *self.patterns.values())):
            raise ValueError(f"{self.pattern} has no groups that an order of inputs matters to; give N:M as in 2:4")
        return self


class PermuteConfig(Config):
    """Reorder channels so that an N:M pattern keeps more, at no cost: the model computes the same."""

    pattern: Pattern = NM(2, 4)
    """The N:M pattern that the model is to be pruned to."""
    score: Criterion = "wanda"
    """What counts as kept: a pruner that scores each weight, as magnitude, wanda or ria do."""
    scope: tuple[Literal["mlp", "attention", "residual"], ...] = Field(
        default=("mlp", "attention", "residual"), min_length=1
    )
    """Channels to reorder: inside MLPs, inside attention heads, and in the stream between the blocks."""
    rounds: int = Field(default=100, ge=0)
    """Search effort: rounds of exchanges for each order, at most."""
    rows: int = Field(default=16384, ge=1)
    """Rows of scores looked at for each order; of more, a random sample."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text the score looks at, if it looks at any."""
    dtype: Dtype = "auto"
    """Dtype of the forward passes; what is stored keeps its own. A model already in memory keeps its dtype."""
    device: Device = "auto"
    """Where the forward passes and the search run. A model already in memory stays where it is."""
    activation_memory_gb: float = Field(default=4.0, ge=0)
    """Hidden states held in memory; more spill to disk."""

    @field_validator("pattern")
    @classmethod
    def _groups(cls, pattern: object) -> object:
        if not isinstance(pattern, NM):
            raise ValueError(f"{pattern} has no groups that an order of channels matters to; give N:M as in 2:4")
        return pattern
