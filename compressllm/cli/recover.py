"""``compressllm recover``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressllm.cli.arguments import AsJson, Out, Resume, Seed
from compressllm.cli.output import flag, given, print_json, results, warn
from compressllm.cli.running import run_and_print
from compressllm.recover.config import RecoverConfig

Student = Annotated[str, typer.Argument(help="Pruned model: run folder, folder, packed export or hub id.")]


def recover(
    student: Student,
    out: Out,
    teacher: Annotated[str | None, flag(RecoverConfig, "teacher")] = None,
    data: Annotated[list[str] | None, flag(RecoverConfig, "data", "May be repeated.")] = None,
    mixture: Annotated[str | None, flag(RecoverConfig, "mixture", "As in 0.7,0.3.")] = None,
    records: Annotated[list[str] | None, flag(RecoverConfig, "records", "May be repeated.")] = None,
    held_out: Annotated[float | None, flag(RecoverConfig, "held_out")] = None,
    seqlen: Annotated[int | None, flag(RecoverConfig, "seqlen")] = None,
    max_tokens: Annotated[int | None, flag(RecoverConfig, "max_tokens")] = None,
    batch_tokens: Annotated[int | None, flag(RecoverConfig, "batch_tokens")] = None,
    micro_batch: Annotated[int | None, flag(RecoverConfig, "micro_batch")] = None,
    lr: Annotated[float | None, flag(RecoverConfig, "lr")] = None,
    warmup: Annotated[float | None, flag(RecoverConfig, "warmup")] = None,
    schedule: Annotated[str | None, flag(RecoverConfig, "schedule")] = None,
    weight_decay: Annotated[float | None, flag(RecoverConfig, "weight_decay")] = None,
    clip: Annotated[float | None, flag(RecoverConfig, "clip")] = None,
    losses: Annotated[str | None, flag(RecoverConfig, "losses")] = None,
    teacher_cache: Annotated[int | None, flag(RecoverConfig, "teacher_cache")] = None,
    temperature: Annotated[float | None, flag(RecoverConfig, "temperature")] = None,
    masking: Annotated[str | None, flag(RecoverConfig, "masking")] = None,
    pattern: Annotated[str | None, flag(RecoverConfig, "pattern")] = None,
    skip: Annotated[list[str] | None, flag(RecoverConfig, "skip", "May be repeated.")] = None,
    decay: Annotated[str | None, flag(RecoverConfig, "decay")] = None,
    decay_strength: Annotated[float | None, flag(RecoverConfig, "decay_strength")] = None,
    refresh: Annotated[int | None, flag(RecoverConfig, "refresh")] = None,
    train: Annotated[str | None, flag(RecoverConfig, "train")] = None,
    slorb: Annotated[str | None, flag(RecoverConfig, "slorb", "A mapping, as in '{block: 16, export: drop}'.")] = None,
    activation_checkpointing: Annotated[bool | None, flag(RecoverConfig, "activation_checkpointing")] = None,
    sharding: Annotated[str | None, flag(RecoverConfig, "sharding")] = None,
    evaluate_every: Annotated[float | None, flag(RecoverConfig, "evaluate_every")] = None,
    save_every: Annotated[float | None, flag(RecoverConfig, "save_every")] = None,
    seed: Seed = 0,
    dtype: Annotated[str | None, flag(RecoverConfig, "dtype")] = None,
    device: Annotated[str | None, flag(RecoverConfig, "device")] = None,
    budget_check: Annotated[
        bool, typer.Option("--budget-check", help="Only say how far weights can decay in this many steps.")
    ] = False,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a pruned model back towards its dense teacher, under its masks. The result is OUT/model."""
    from compressllm.stages.recipe import make_recipe, method_spec, switch_or_mapping

    settings = given(
        teacher=teacher, data=data, mixture=_numbers(mixture), records=records, held_out=held_out, seqlen=seqlen,
        max_tokens=max_tokens, batch_tokens=batch_tokens, micro_batch=micro_batch, lr=lr, warmup=warmup,
        schedule=schedule, weight_decay=weight_decay, clip=clip, losses=losses, teacher_cache=teacher_cache,
        temperature=temperature, masking=masking, pattern=pattern, skip=skip, decay=decay,
        decay_strength=decay_strength, refresh=refresh, train=method_spec(train),
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
