"""``compressllm recover``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressllm.cli.arguments import AsJson, Out, Resume, Seed
from compressllm.cli.output import flag, given, print_json, results, warn
from compressllm.cli.running import run_and_print
from compressllm.stages.recoverconfig import RecoverStageConfig

Student = Annotated[str, typer.Argument(help="Pruned model: run folder, folder, packed export or hub id.")]


def recover(
    student: Student,
    out: Out,
    teacher: Annotated[str | None, flag(RecoverStageConfig, "teacher")] = None,
    teacher_tokens: Annotated[int | None, flag(RecoverStageConfig, "teacher_tokens")] = None,
    teacher_lr: Annotated[float | None, flag(RecoverStageConfig, "teacher_lr")] = None,
    data: Annotated[list[str] | None, flag(RecoverStageConfig, "data", "May be repeated.")] = None,
    mixture: Annotated[str | None, flag(RecoverStageConfig, "mixture", "As in 0.7,0.3.")] = None,
    records: Annotated[list[str] | None, flag(RecoverStageConfig, "records", "May be repeated.")] = None,
    select: Annotated[str | None, flag(RecoverStageConfig, "select")] = None,
    held_out: Annotated[float | None, flag(RecoverStageConfig, "held_out")] = None,
    seqlen: Annotated[int | None, flag(RecoverStageConfig, "seqlen")] = None,
    max_tokens: Annotated[int | None, flag(RecoverStageConfig, "max_tokens")] = None,
    batch_tokens: Annotated[int | None, flag(RecoverStageConfig, "batch_tokens")] = None,
    micro_batch: Annotated[int | None, flag(RecoverStageConfig, "micro_batch")] = None,
    lr: Annotated[float | None, flag(RecoverStageConfig, "lr")] = None,
    warmup: Annotated[float | None, flag(RecoverStageConfig, "warmup")] = None,
    schedule: Annotated[str | None, flag(RecoverStageConfig, "schedule")] = None,
    weight_decay: Annotated[float | None, flag(RecoverStageConfig, "weight_decay")] = None,
    clip: Annotated[float | None, flag(RecoverStageConfig, "clip")] = None,
    losses: Annotated[str | None, flag(RecoverStageConfig, "losses")] = None,
    teacher_cache: Annotated[int | None, flag(RecoverStageConfig, "teacher_cache")] = None,
    temperature: Annotated[float | None, flag(RecoverStageConfig, "temperature")] = None,
    masking: Annotated[str | None, flag(RecoverStageConfig, "masking")] = None,
    pattern: Annotated[str | None, flag(RecoverStageConfig, "pattern")] = None,
    skip: Annotated[list[str] | None, flag(RecoverStageConfig, "skip", "May be repeated.")] = None,
    decay: Annotated[str | None, flag(RecoverStageConfig, "decay")] = None,
    decay_strength: Annotated[float | None, flag(RecoverStageConfig, "decay_strength")] = None,
    refresh: Annotated[int | None, flag(RecoverStageConfig, "refresh")] = None,
    quantize: Annotated[str | None, flag(RecoverStageConfig, "quantize")] = None,
    train: Annotated[str | None, flag(RecoverStageConfig, "train")] = None,
    frozen: Annotated[list[str] | None, flag(RecoverStageConfig, "frozen", "May be repeated.")] = None,
    slorb: Annotated[
        str | None, flag(RecoverStageConfig, "slorb", "A mapping, as in '{block: 16, export: drop}'.")
    ] = None,
    activation_checkpointing: Annotated[bool | None, flag(RecoverStageConfig, "activation_checkpointing")] = None,
    sharding: Annotated[str | None, flag(RecoverStageConfig, "sharding")] = None,
    evaluate_every: Annotated[float | None, flag(RecoverStageConfig, "evaluate_every")] = None,
    save_every: Annotated[float | None, flag(RecoverStageConfig, "save_every")] = None,
    seed: Seed = 0,
    dtype: Annotated[str | None, flag(RecoverStageConfig, "dtype")] = None,
    device: Annotated[str | None, flag(RecoverStageConfig, "device")] = None,
    budget_check: Annotated[
        bool, typer.Option("--budget-check", help="Only say how far weights can decay in this many steps.")
    ] = False,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a pruned model back towards its dense teacher, under its masks. The result is OUT/model."""
    from compressllm.stages.recipe import make_recipe, method_spec, switch_or_mapping

    settings = given(
        teacher=teacher, teacher_tokens=teacher_tokens, teacher_lr=teacher_lr, data=data,
        mixture=_numbers(mixture), records=records, select=select, held_out=held_out,
        seqlen=seqlen, max_tokens=max_tokens, batch_tokens=batch_tokens, micro_batch=micro_batch, lr=lr, warmup=warmup,
        schedule=schedule, weight_decay=weight_decay, clip=clip, losses=losses, teacher_cache=teacher_cache,
        temperature=temperature, masking=masking, pattern=pattern, skip=skip, decay=decay,
        decay_strength=decay_strength, refresh=refresh, quantize=quantize, train=method_spec(train), frozen=frozen,
        slorb=switch_or_mapping(slorb, "--slorb"), activation_checkpointing=activation_checkpointing,
        sharding=sharding, evaluate_every=evaluate_every,
        save_every=save_every, dtype=dtype, device=device,
    )  # fmt: skip
    recipe = make_recipe({"model": student, "seed": seed, "stages": [{"recover": settings}]})
    if budget_check:
        _print_budget(student, recipe.steps()[0][1], as_json)
    else:
        run_and_print(recipe, out, resume, as_json)


def _print_budget(student: str, config: Any, as_json: bool) -> None:
    from compressllm.core.run import Run
    from compressllm.models.bundle import open_bundle
    from compressllm.recover.budget import decay_budget

    budget = decay_budget(open_bundle(student), config, Run(on_warning=warn))
    if as_json:
        print_json(budget.facts())
        return
    results.print(budget.sentence, soft_wrap=True)
    if budget.short:
        warn(budget.short)


def _numbers(text: str | None) -> list[str] | None:
    return text.split(",") if text else None
