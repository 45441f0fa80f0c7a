"""The stages a recipe may name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressllm.contextual.config import ContextualConfig
from compressllm.core.config import Config
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.export.config import ExportConfig
from compressllm.prune.config import PermuteConfig, PruneConfig
from compressllm.quantize.config import QuantizeConfig
from compressllm.stages.recoverconfig import RecoverStageConfig

if TYPE_CHECKING:
    from compressllm.models.bundle import Bundle


@dataclass(frozen=True)
class Stage:
    """One kind of stage.

    Args:
        name: Its key in recipes.
        config: Its settings.
        run: ``(Bundle, config, Run) -> Bundle``. It imports what it needs when it is called, so that reading a
            recipe is quick.
        plan: One line on what it would do, having checked what can be checked without doing it.
        writes_model: Whether it leaves a checkpoint at ``run.folder / "model"``.
        shared: Whether all processes of a launch run it together; if not, the first runs it and the others wait.
    """

    name: str
    config: type[Config]
    run: Callable[[Bundle, Any, Run], Bundle]
    plan: Callable[[Bundle, Any], str]
    writes_model: bool
    shared: bool = False


def _prune(bundle: Bundle, config: PruneConfig, run: Run) -> Bundle:
    from compressllm.prune.model import prune_model

    return prune_model(bundle, config, run)


def _plan_prune(bundle: Bundle, config: PruneConfig) -> str:
    from compressllm.core.protocols import PRUNERS
    from compressllm.core.registry import build
    from compressllm.prune.given import open_given
    from compressllm.prune.plan import make_plan

    pruner = build(PRUNERS, config.method)
    given = open_given(config, pruner, bundle)
    plan = given.plan if given else make_plan(bundle.model, config.pattern, config.skip, pruner.group, config.patterns)
    patterns = ", ".join(dict.fromkeys(str(pattern) for pattern in plan.values()))
    order = ", in an order of inputs of each linear's own" if config.gather else ""
    return f"{config.method}, {len(plan)} linears to {patterns}{order}"


def _permute(bundle: Bundle, config: PermuteConfig, run: Run) -> Bundle:
    from compressllm.prune.permute import permute_model

    return permute_model(bundle, config, run)


def _plan_permute(bundle: Bundle, config: PermuteConfig) -> str:
    from compressllm.prune.permute import choose_channels

    channels = choose_channels(bundle, config).channels
    counts = (f"{sum(one.scope == scope for one in channels)} {scope}" for scope in dict.fromkeys(config.scope))
    return f"channels for {config.pattern} by {config.score}: {', '.join(counts)}"


def _recover(bundle: Bundle, config: RecoverStageConfig, run: Run) -> Bundle:
    from compressllm.stages.recovery import recover_stage

    return recover_stage(bundle, config, run)


def _plan_recover(bundle: Bundle, config: RecoverStageConfig) -> str:
    from compressllm.models.resolve import resolve_model

    if config.teacher is not None:
        resolve_model(config.teacher)
    chosen = f"records chosen by {config.select.method}, budget {config.select.budget:g}; " if config.select else ""
    return (
        f"{chosen}{config.masking} masks, losses {config.losses}, {config.steps} steps of "
        f"{config.windows_per_step * config.seqlen} tokens"
    )


def _quantize(bundle: Bundle, config: QuantizeConfig, run: Run) -> Bundle:
    from compressllm.quantize.model import quantize_model

    return quantize_model(bundle, config, run)


def _plan_quantize(bundle: Bundle, config: QuantizeConfig) -> str:
    from compressllm.core.scheme import parse_scheme
    from compressllm.quantize.model import to_quantize

    linears = to_quantize(bundle.model, config.skip, parse_scheme(config.scheme))
    return f"{config.method}, {len(linears)} linears to {config.scheme}"


def _contextual(bundle: Bundle, config: ContextualConfig, run: Run) -> Bundle:
    from compressllm.stages.contextual import contextual_stage

    return contextual_stage(bundle, config, run)


def _plan_contextual(bundle: Bundle, config: ContextualConfig) -> str:
    from compressllm.stages.contextual import plan_contextual

    return plan_contextual(bundle, config)


def _export(bundle: Bundle, config: ExportConfig, run: Run) -> Bundle:
    from compressllm.stages.export import export_stage

    return export_stage(bundle, config, run)


def _evaluate(bundle: Bundle, config: EvalConfig, run: Run) -> Bundle:
    from compressllm.stages.evaluate import evaluate_stage

    return evaluate_stage(bundle, config, run)


def _plan_evaluate(bundle: Bundle, config: EvalConfig) -> str:
    return ", ".join([*([str(config.text)] if config.text else []), *config.tasks])


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("permute", PermuteConfig, _permute, _plan_permute, writes_model=True),
        Stage("prune", PruneConfig, _prune, _plan_prune, writes_model=True, shared=True),
        Stage("recover", RecoverStageConfig, _recover, _plan_recover, writes_model=True, shared=True),
        Stage("contextual", ContextualConfig, _contextual, _plan_contextual, writes_model=True),
        Stage("quantize", QuantizeConfig, _quantize, _plan_quantize, writes_model=True),
        Stage("export", ExportConfig, _export, lambda bundle, config: str(config.format), writes_model=True),
        Stage("eval", EvalConfig, _evaluate, _plan_evaluate, writes_model=False),
    )
}
