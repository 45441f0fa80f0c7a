"""``compressllm bench``."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from compressllm.cli.arguments import AsJson, Device, DType, KeepDense
from compressllm.cli.output import bytes_text, given, print_json, results, say
from compressllm.core.errors import RecipeError
from compressllm.eval.config import EvalConfig

if TYPE_CHECKING:
    from compressllm.bench.plot import Bar


def bench(
    model: Annotated[str | None, typer.Argument(help="What to load; none with --layers.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Single linears instead: out x in, as 4096x4096,14336x4096.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Backends to hold against dense, by name or auto; with a model also native:int8 and the like."
        ),
    ] = "auto",
    batch: Annotated[str, typer.Option(help="Sequences at a time, one or several numbers.")] = "1",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in a turn.")] = 32,
    step: Annotated[
        str, typer.Option(help="How tokens are decoded: native, where the model allows; transformers; compiled.")
    ] = "native",
    tokens: Annotated[str, typer.Option(help="With --layers: rows of the activations.")] = "1,16",
    formats: Annotated[str, typer.Option(help="With --layers: bf16, int8, int4.")] = "bf16",
    pattern: Annotated[str, typer.Option(help="With --layers: the weights' pattern.")] = "2:4",
    group: Annotated[int, typer.Option(help="With --layers: weights that share a scale.")] = 64,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="For each batch, 20; for each shape and number of tokens, 1.")
    ] = None,
    dtype: DType = None,
    device: Device = None,
    keep_dense: KeepDense = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this SVG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second, sparse against dense, of a model or of single linears."""
    from compressllm.stages.recipe import make_config

    if (model is None) == (layers is None):
        raise RecipeError("bench needs a model or --layers, one of the two; for example --layers 4096x4096")
    config = make_config(EvalConfig, given(dtype=dtype, device=device, keep_dense=keep_dense))
    asked = _Asked(_words(backend), config, plot, as_json)
    if layers is not None:
        options = {"tokens": _numbers(tokens), "formats": _words(formats), "group": group}
        _bench_layers(layers, pattern, asked, given(seconds=seconds, **options))
    elif model is not None:
        options = {"batches": _numbers(batch), "prompt": prompt, "tokens": new_tokens, "steps": _words(step)}
        _bench_model(model, asked, given(seconds=seconds, **options))


class _Asked(NamedTuple):
    """What was asked for of a model and of single linears alike."""

    backends: tuple[str, ...]
    config: EvalConfig
    plot: Path | None
    as_json: bool


def _bench_layers(layers: str, pattern: str, asked: _Asked, options: Mapping[str, Any]) -> None:
    from compressllm.bench.layers import LayerBench, bench_layers
    from compressllm.bench.plot import Bar
    from compressllm.core.compute import choose_device
    from compressllm.core.pattern import parse_pattern

    settings = LayerBench(
        _shapes(layers),
        pattern=parse_pattern(pattern),
        backends=asked.backends,
        device=choose_device(asked.config.device),
        **options,
    )
    measured = []
    for one in bench_layers(settings):
        measured.append(one)
        row = (one["rows"] or one["dense"])[0]
        say(
            f"{_shape(row)}, {row['tokens']} tokens: measured {len(one['rows']) + len(one['dense'])} ways to compute it"
        )
    rows = [row for one in measured for row in one["rows"]]
    dense = [row for one in measured for row in one["dense"]]
    refused = {name: reason for one in measured for name, reason in one["refused"].items()}
    auto = {f"{_shape(one['dense'][0])} {form}": choice for one in measured for form, choice in one["auto"].items()}
    if asked.plot:
        bars = []
        for row in sorted(rows + dense, key=lambda row: (row["shape"], row["tokens"], row in rows)):
            label = f"{_shape(row)}, {row['tokens']} t, {row['format']} {row['backend']}"
            bars.append(Bar(label, row["speedup"], row["speedup"], row["speedup"], row in dense))
        _draw(asked.plot, bars, f"Single linears at {pattern}", "times as fast as torch's bfloat16 linear")
    if asked.as_json:
        rates = [one["read_bytes_per_second"] for one in measured]
        print_json(
            {
                "rows": rows,
                "dense": dense,
                "pattern": pattern,
                "group": settings.group,
                "refused": refused,
                "auto": auto,
                "read_bytes_per_second": max(rates),
                **_made(),
            }
        )
        return
    table = Table("shape", "tokens", "format", "backend", "x bf16", "x best dense", "bandwidth", "time", box=None)
    for row in rows + dense:
        table.add_row(
            _shape(row),
            str(row["tokens"]),
            row["format"],
            row["backend"],
            f"{row['speedup']:.2f}",
            f"{row['speedup_best_dense']:.2f}",
            f"{row['bandwidth_share']:.0%}",
            f"{1e6 * row['seconds']['median']:.0f} us",
        )
    results.print(table)
    for kind, choice in auto.items():
        results.print(f"auto takes {choice['name']} for {kind}", soft_wrap=True)
        _print_refused(choice["refused"], "  ")
    _print_refused(refused, "")


def _bench_model(model: str, asked: _Asked, options: Mapping[str, Any]) -> None:
    from compressllm.bench.model import ModelBench, backend_of, bench_model
    from compressllm.bench.plot import Bar
    from compressllm.models.bundle import open_bundle
    from compressllm.stages.recipe import make_config

    for name in asked.backends:
        make_config(EvalConfig, {"backend": backend_of(name)[0]})  # a name that is none is found before the work
    measured = bench_model(open_bundle(model), ModelBench(backends=asked.backends, **options), asked.config)
    rows = measured["rows"]
    if asked.plot:
        bars = []
        for row in rows:
            step, batch = row["seconds_per_step"], row["batch"]
            ends = (batch / step["high"], batch / step["low"])
            label = f"{row['backend']}, batch {batch}, {row['step']}"
            bars.append(Bar(label, row["decode_tokens_per_second"], *ends, row["backend"] == "dense"))
        _draw(asked.plot, bars, f"Decoding {Path(model).name}", "tokens a second")
    if asked.as_json:
        print_json({"model": model, **measured, **_made()})
        return
    table = Table(
        "backend",
        "batch",
        "step",
        "prefill/s",
        "x",
        "decode/s",
        "x",
        "spread",
        "bandwidth",
        "weights",
        "load peak",
        box=None,
    )
    for row in rows:
        step = row["seconds_per_step"]
        table.add_row(
            row["backend"],
            str(row["batch"]),
            row["step"],
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['prefill_speedup']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_speedup']:.2f}",
            f"{row['batch'] / step['high']:.1f}-{row['batch'] / step['low']:.1f}",
            f"{row['bandwidth_share']:.0%}",
            bytes_text(row["weight_bytes"]),
            bytes_text(row["load_peak_bytes"]),
        )
    results.print(table)
    results.print(f"{measured['dtype']} on {measured['device']}, {measured['threads']} threads", soft_wrap=True)
    for name, chosen in measured["backends"].items():
        linears = ", ".join(f"{count} on {backend}" for backend, count in chosen["linears"].items())
        results.print(f"{name}: {linears or 'no sparse linears'}", soft_wrap=True)
        _print_refused(chosen["refused"] if name.startswith("auto") else {}, "  ")


def _made() -> dict[str, Any]:
    """When, where and by which command a result was made."""
    from compressllm.stages.environment import environment

    command = shlex.join(["compressllm", *sys.argv[1:]])
    return {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment()}


def _print_refused(refused: Mapping[str, str], indent: str) -> None:
    for name, reason in refused.items():
        results.print(f"{indent}not {name}: {reason}", soft_wrap=True, markup=False)


def _draw(path: Path, bars: Sequence[Bar], title: str, unit: str) -> None:
    from compressllm.bench.plot import bars_svg

    path.write_text(bars_svg(bars, title, unit))
    say(f"drawn into {path}")


def _shape(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def _words(listed: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(_checked(listed, r"[1-9]\d{0,6}", "numbers, as 1,16", int))


def _shapes(listed: str) -> list[tuple[int, int]]:
    def shape(word: str) -> tuple[int, int]:
        out, columns = map(int, word.split("x"))
        return out, columns

    return list(_checked(listed, r"[1-9]\d{0,6}x[1-9]\d{0,6}", "out x in, as 4096x4096,14336x4096", shape))


def _checked(listed: str, form: str, wanted: str, read: Any) -> Iterable[Any]:
    words = _words(listed)
    if not words or not all(re.fullmatch(form, word) for word in words):
        raise RecipeError(f"cannot read {listed!r}; give {wanted}")
    return map(read, words)
