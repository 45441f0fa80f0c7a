"""``compressllm verify --against``: whether two models compute the same."""

from __future__ import annotations

from typing import Annotated

import typer

from compressllm.cli.output import print_json, results

Against = Annotated[
    str | None, typer.Option(help="Compare the logits with this model's, both in float32, and check nothing else.")
]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens to compare logits on.")]
Tolerance = Annotated[
    float, typer.Option(min=0, help="The largest difference taken for rounding, of the largest logit.")
]


def compare_logits(model: str, against: str, tokens: int, tolerance: float, as_json: bool) -> None:
    """Print how far apart two models' logits are.

    Raises: CompressError of the kind that fits; typer.Exit with code 1 if they differ by more than ``tolerance``.
    """
    from compressllm.eval.agreement import logit_difference, shared_ids
    from compressllm.models.bundle import open_bundle

    one, other = open_bundle(model), open_bundle(against)
    ids, source = shared_ids(one, other, tokens)
    difference = logit_difference(one, other, ids)
    same = difference <= tolerance  # not so for NaN
    if as_json:
        print_json({"ok": same, "difference": difference, "tolerance": tolerance, "tokens": ids.numel()})
    else:
        results.print(
            f"{'ok' if same else 'FAILED'}: logits differ by at most {difference:.2e} of the largest, on {source}; "
            f"the tolerance is {tolerance:.0e}",
            soft_wrap=True,
        )
    if not same:
        raise typer.Exit(1)
