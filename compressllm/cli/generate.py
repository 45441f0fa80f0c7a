"""``compressllm generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressllm.cli.arguments import AsJson, Backend, Device, DType, KeepDense, Model
from compressllm.cli.output import given, print_json, results, say
from compressllm.core.errors import RecipeError
from compressllm.eval.config import EvalConfig

if TYPE_CHECKING:
    from compressllm.contextual.streaming import Stream


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; greedy without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    fast: Annotated[
        bool, typer.Option(help="Decode in C if the model allows, else compile first, which pays off for long texts.")
    ] = False,
    contextual: Annotated[
        str | None, typer.Option(help="Draft with some neurons only: see compressllm list neuron-selectors.")
    ] = None,
    density: Annotated[float, typer.Option(help="Fraction of neurons that drafts keep.")] = 0.5,
    correct: Annotated[
        str | None, typer.Option(help="Have the whole model correct drafts: see compressllm list correctors.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration of the selector; without, the one beside the model.")
    ] = None,
    dtype: DType = None,
    device: Device = None,
    backend: Backend = None,
    keep_dense: KeepDense = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, by all neurons of the model or by a few that are chosen for it."""
    from compressllm.eval.generation import generate_text
    from compressllm.kernels.native.llama import llama_step
    from compressllm.models.bundle import open_bundle
    from compressllm.stages.contextual import open_stream
    from compressllm.stages.evaluate import prepare
    from compressllm.stages.recipe import make_config, method_spec

    if contextual is None and (correct is not None or calibration is not None):
        raise RecipeError("--correct and --calibration are about drafts; name a selector with --contextual")
    if contextual is not None and fast:
        raise RecipeError("--fast: is for the whole model, not for drafts; leave it or --contextual out")
    bundle = open_bundle(model)
    config = make_config(EvalConfig, given(dtype=dtype, device=device, backend=backend, keep_dense=keep_dense))
    if contextual is not None:
        stream = open_stream(bundle, config, method_spec(contextual), density, method_spec(correct), calibration)
        _continue_in_pieces(stream, prompt, max_new_tokens, temperature, seed, chat, as_json)
        return
    live, _ = prepare(bundle, config)
    sampling = {"temperature": temperature, "seed": seed, "chat": chat, "fast": fast, "native": llama_step}
    made = generate_text(live, bundle.tokenizer, prompt, max_new_tokens, **sampling)  # type: ignore[arg-type]
    if as_json:
        print_json({"text": made.text, "tokens": made.tokens, "tokens_per_second": made.tokens_per_second})
        return
    results.print(made.text if chat else prompt + made.text, markup=False, soft_wrap=True)
    say(f"{made.tokens} tokens, {made.tokens_per_second:.1f} tokens/s")


def _continue_in_pieces(
    stream: Stream, prompt: str, limit: int, temperature: float | None, seed: int, chat: bool, as_json: bool
) -> None:
    if not as_json and not chat:
        results.print(prompt, end="", markup=False, soft_wrap=True)
    for piece in stream.pieces(prompt, limit, temperature, seed, chat):
        if not as_json:
            results.print(piece, end="", markup=False, soft_wrap=True)
            results.file.flush()
    facts = stream.facts()
    if as_json:
        print_json({"text": stream.text, **facts})
        return
    results.print()
    words = [f"{facts['tokens']} tokens"]
    words += [f"{facts['tokens_per_second']:.1f} tokens/s"] if facts["tokens_per_second"] else []
    words += [f"{facts['advance_length']:.2f} tokens a check"] if facts["advance_length"] else []
    words += [f"read density {facts['read_density']:.3f}"]
    words += [f"effective density {facts['effective_density']:.3f}"] if facts["effective_density"] else []
    say(", ".join(words))
