"""``compressllm generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from compressllm.cli.arguments import AsJson, Backend, Device, DType, KeepDense, Model
from compressllm.cli.output import given, print_json, results, say
from compressllm.eval.config import EvalConfig


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; greedy without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile the decoding step first; pays off for long texts.")] = False,
    dtype: DType = None,
    device: Device = None,
    backend: Backend = None,
    keep_dense: KeepDense = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    from compressllm.eval.generation import generate_text
    from compressllm.models.bundle import open_bundle
    from compressllm.stages.evaluate import prepare
    from compressllm.stages.recipe import make_config

    bundle = open_bundle(model)
    config = make_config(EvalConfig, given(dtype=dtype, device=device, backend=backend, keep_dense=keep_dense))
    live, _ = prepare(bundle, config)
    sampling = {"temperature": temperature, "seed": seed, "chat": chat, "compiled": compile}
    made = generate_text(live, bundle.tokenizer, prompt, max_new_tokens, **sampling)  # type: ignore[arg-type]
    if as_json:
        print_json({"text": made.text, "tokens": made.tokens, "tokens_per_second": made.tokens_per_second})
        return
    results.print(made.text if chat else prompt + made.text, markup=False, soft_wrap=True)
    say(f"{made.tokens} tokens, {made.tokens_per_second:.1f} tokens/s")
