"""``compressllm soup``."""

from __future__ import annotations

from typing import Annotated

import typer

from compressllm.cli.arguments import AsJson, Device, DType, Out, Seed
from compressllm.cli.output import flag, given, print_json, results, show, warn
from compressllm.stages.soupconfig import SoupConfig


def soup(
    members: Annotated[list[str], typer.Argument(help="Models recovered from one pruned model, with the same masks.")],
    out: Out,
    method: Annotated[str | None, flag(SoupConfig, "method")] = None,
    data: Annotated[str | None, flag(SoupConfig, "source")] = None,
    windows: Annotated[int | None, flag(SoupConfig, "windows")] = None,
    seqlen: Annotated[int | None, flag(SoupConfig, "seqlen")] = None,
    seed: Seed = 0,
    dtype: DType = None,
    device: Device = None,
    format: Annotated[str | None, flag(SoupConfig, "format")] = None,
    as_json: AsJson = False,
) -> None:
    """Average recovered models into one, exactly as sparse as they are."""
    from compressllm.core.run import Run
    from compressllm.stages.recipe import make_config
    from compressllm.stages.soup import make_soup

    flags = given(method=method, source=data, windows=windows, seqlen=seqlen, dtype=dtype, device=device, format=format)
    facts = make_soup(members, out, make_config(SoupConfig, flags), Run(seed, show=show, on_warning=warn))
    made = facts.source["soup"]
    if as_json:
        print_json(facts.model_dump(mode="json", exclude={"linears"}))
        return
    names = ", ".join(member["folder"] for member in made["members"])
    results.print(f"{out}: {made['method']} soup of {names}; {len(facts.linears)} sparse linears", soft_wrap=True)
    if "loss" in made:
        best = min(made["alone"].values())
        results.print(f"held-out loss {made['loss']:.4f}, of the best alone {best:.4f}", soft_wrap=True)
