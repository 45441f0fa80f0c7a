"""Settings of the prune stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from compressllm.calibration.config import CalibrationConfig
from compressllm.core.config import Config, Device, Dtype, Pattern, method_of
from compressllm.core.pattern import NM
from compressllm.core.protocols import PRUNERS

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


class PruneConfig(Config):
    """Prune a checkpoint in one shot."""

    method: method_of(PRUNERS) = "wanda"  # type: ignore[valid-type]
    """How weights are chosen: a name from `compressllm list pruners`, or {name: {option: value}}."""
    pattern: Pattern = NM(2, 4)
    """What stays: N:M as in 2:4 (keep 2 of every 4), or the fraction removed as in 0.5, 0.5/row, 0.5/layer."""
    skip: tuple[str, ...] = ()
    """Globs of linears to leave dense, as in '*.o_proj' or 'model.layers.0.*'."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text the method looks at, if it looks at any."""
    reconstruct: Reconstruct = None
    """Train what stays of each block towards the dense outputs: true, or a mapping of settings."""
    dtype: Dtype = "auto"
    """Dtype of the forward passes; what is stored keeps its own. A model already in memory keeps its dtype."""
    device: Device = "auto"
    """Where the forward passes run. A model already in memory stays where it is."""
    activation_memory_gb: float = Field(default=4.0, ge=0)
    """Hidden states held in memory; more spill to disk."""
