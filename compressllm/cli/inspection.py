"""``compressllm inspect`` and ``compressllm verify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from compressllm.cli.agreement import Against, Tokens, Tolerance, compare_logits
from compressllm.cli.arguments import AsJson, Device, DType, Model
from compressllm.cli.output import bytes_text, given, print_json, results, say, show

if TYPE_CHECKING:
    from compressllm.models.checkpoint import Checkpoint
    from compressllm.models.survey import LinearSurvey

PatternOption = Annotated[
    str | None, typer.Option(help="Hold every linear against this pattern; without, each against its own.")
]


def inspect(
    model: Model,
    backends: Annotated[
        bool, typer.Option(help="Also show which kernel backend `auto` takes on this machine, and why no other.")
    ] = False,
    dtype: DType = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show per-layer sparsity, patterns and sizes."""
    checkpoint, rows = _survey(model, None)
    facts = _facts(checkpoint, rows)
    if backends:
        facts["backends"] = _backends(checkpoint, given(dtype=dtype, device=device))
    if as_json:
        print_json({**facts, "linears": [row.facts() for row in rows]})
        return
    table = Table("linear", "shape", "dtype", "pattern", "sparsity", box=None)
    for row in rows:
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            row.scheme or row.dtype,
            row.pattern or "dense",
            f"{row.sparsity:.4f}",
        )
    results.print(table)
    results.print(
        f"{facts['format']}, {len(rows)} prunable linears, sparsity {facts['sparsity']:.4f}; "
        f"weights {bytes_text(facts['bytes'])} on disk, {bytes_text(facts['bytes_dense'])} as plain tensors",
        soft_wrap=True,
    )
    for kind, choice in facts.get("backends", {}).items():
        results.print(f"auto takes {choice['name']} for {kind}{_speedups(choice)}", soft_wrap=True, markup=False)
        for name, reason in choice["refused"].items():
            results.print(f"  not {name}: {reason}", soft_wrap=True, markup=False)


def verify(
    model: Model,
    pattern: PatternOption = None,
    against: Against = None,
    tokens: Tokens = 256,
    tolerance: Tolerance = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Check patterns, masks, -0.0, non-finite values and file hashes. Exit code 1 if anything is wrong.

    With --against, check instead that the model computes what another does.
    """
    if against is not None:
        compare_logits(model, against, tokens, tolerance, as_json)
        return
    from compressllm.core.pattern import parse_pattern
    from compressllm.models.survey import damaged_files

    checkpoint, rows = _survey(model, parse_pattern(pattern) if pattern else None)
    damaged = damaged_files(checkpoint, show)
    wrong = [row for row in rows if not row.sound]
    if as_json:
        facts = _facts(checkpoint, rows)
        print_json({**facts, "ok": not (wrong or damaged), "damaged": damaged, "wrong": [r.facts() for r in wrong]})
    else:
        for row in wrong:
            results.print(f"{row.name}: {_complaint(row)}", soft_wrap=True)
        for name in damaged:
            results.print(f"{name}: its bytes are not those that were written", soft_wrap=True)
        checked = sum(row.pattern is not None for row in rows)
        results.print(
            f"{'FAILED' if wrong or damaged else 'ok'}: {len(rows)} linears read, {checked} held against a pattern, "
            f"{len(wrong)} wrong, {len(damaged)} damaged files",
            soft_wrap=True,
        )
    if wrong or damaged:
        raise typer.Exit(1)


def _backends(checkpoint: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """Kind of sparse linear -> what `auto` chooses for it."""
    from compressllm.eval.config import EvalConfig
    from compressllm.models.bundle import bundle_of
    from compressllm.stages.evaluate import choices_ahead
    from compressllm.stages.recipe import make_config

    choices = choices_ahead(bundle_of(checkpoint), make_config(EvalConfig, options))
    return {kind: asdict(choice) for kind, choice in choices.items()}


def _speedups(choice: Mapping[str, Any]) -> str:
    """``, 2.3 times as fast as dense at 1 token, 1.1 at 256``; nothing if dense won or nothing was measured."""
    own, dense = choice["measured"].get(choice["name"]), choice["measured"].get("dense")
    if not own or not dense or own is dense:
        return ""
    parts = [f"{dense[n] / own[n]:.2f} at {n}" for n in own]
    return f"; times as fast as dense by tokens: {', '.join(parts)}"


def _survey(model: str, pattern: Any) -> tuple[Checkpoint, list[LinearSurvey]]:
    from compressllm.models.checkpoint import Checkpoint
    from compressllm.models.resolve import resolve_model
    from compressllm.models.survey import survey

    checkpoint = Checkpoint(resolve_model(model))
    if checkpoint.facts and checkpoint.facts.variant:
        say(f"stock transformers must be told variant={checkpoint.facts.variant!r}, after `import compressllm`")
    count, rows = survey(checkpoint, pattern)
    return checkpoint, list(show(rows, count, "reading"))


def _facts(checkpoint: Checkpoint, rows: Sequence[LinearSurvey]) -> dict[str, Any]:
    total = sum(row.shape[0] * row.shape[1] for row in rows)
    return {
        "folder": str(checkpoint.folder),
        "format": checkpoint.facts.format if checkpoint.facts else "dense",
        "sparsity": sum(row.zeros for row in rows) / total,
        "bytes": sum(path.stat().st_size for path in checkpoint.files),
        "bytes_dense": sum(spec.bytes for spec in checkpoint.specs.values()),
    }


def _complaint(row: LinearSurvey) -> str:
    found = {
        f"groups break {row.pattern}": row.violations,
        "weights outside the mask": row.outside_mask,
        "negative zeros at pruned places": row.negative_zeros,
        "weights not finite": row.not_finite,
    }
    return ", ".join(f"{count} {what}" for what, count in found.items() if count)
