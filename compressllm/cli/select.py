"""``compressllm select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from compressllm.cli.arguments import AsJson, Device, DType
from compressllm.cli.output import flag, given, print_json, results, seconds_text, show, warn
from compressllm.cli.stopping import keeping
from compressllm.select.config import SelectConfig


def select(
    data: Annotated[Path, typer.Argument(help="Records: .jsonl, .json or .parquet, plain or .gz.")],
    out: Annotated[Path, typer.Argument(help="New .jsonl file for the chosen records, best use first.")],
    teacher: Annotated[str, typer.Option(help="The dense model; its tokenizer reads the records.")],
    student: Annotated[str | None, typer.Option(help="The pruned model, for methods that compare the two.")] = None,
    method: Annotated[str | None, flag(SelectConfig, "method")] = None,
    budget: Annotated[float | None, flag(SelectConfig, "budget")] = None,
    max_tokens: Annotated[int | None, flag(SelectConfig, "max_tokens")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same choice.")] = 0,
    dtype: DType = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Choose the records that recovery training learns from."""
    from compressllm.stages.recipe import make_config, method_spec
    from compressllm.stages.selection import select_file

    fields = given(method=method_spec(method), budget=budget, max_tokens=max_tokens, dtype=dtype, device=device)
    config = make_config(SelectConfig, fields)
    with keeping("what was computed is in the cache"):
        report = select_file(data, out, teacher, student, config, seed=seed, show=show, on_warning=warn)
    if as_json:
        print_json(report)
        return
    _print_clusters(report)
    results.print(
        f"chose {report['chosen']} of {report['records']} records, {report['chosen_tokens']} of {report['tokens']} "
        f"tokens, in {seconds_text(report['seconds'])}\nrecords: {out}\nreport: {out.with_suffix('.report.json')}",
        soft_wrap=True,
    )


def _print_clusters(report: dict[str, Any]) -> None:
    """One row a cluster, the most damaged first; nothing if the method makes none."""
    if "clusters" not in report:
        return
    table = Table("cluster", "records", "degradation", "budget", "a record", "rejected", "phrases", box=None)
    for one in sorted(report["clusters"], key=lambda one: -one["degradation"]):
        table.add_row(
            str(one["cluster"]),
            str(one["records"]),
            f"{one['degradation']:.4f}",
            str(one["budget"]),
            f"{one['budget_per_record']:.3f}",
            str(one["rejected"]),
            ", ".join(one["phrases"][:4]),
        )
    results.print(table)
