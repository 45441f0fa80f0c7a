"""What a gather at run time could be worth: 2:4 in an order of inputs that each linear chooses for itself.

    python benchmarks/gather_gain.py --calibration c4 --data wikitext2 --rows wanda,admm

`permute` makes only those orders that cost nothing when the model runs. Every other needs its linear to gather its
inputs first. Each row prunes as `one_shot.py` does, but in the best order found for that one linear, and puts weights
and masks back where they were: what comes out has half of every row and is evaluated dense. Linears that share their
inputs would have to share an order, so this is the most that could be hoped for by that search. A row that begins with
`permute+` orders what costs nothing first. Rows that the result file has already are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from calibrated import add_options, measure_rows
from torch import Tensor

from compressllm.core.pattern import NM, SparsityPattern
from compressllm.core.protocols import PRUNERS, Pruned, Pruner
from compressllm.core.run import Run
from compressllm.core.stats import InputStats, Need
from compressllm.eval.config import EvalConfig
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.prune.config import PermuteConfig, PruneConfig
from compressllm.prune.exchange import find_order
from compressllm.prune.model import prune_model
from compressllm.prune.permute import permute_model
from compressllm.prune.wanda import Wanda
from compressllm.stages.evaluate import measure as measure_model

RESULT = Path(__file__).parent / "results" / "gather_gain.json"


@PRUNERS.register("gathered")
@dataclass(frozen=True)
class Gathered:
    """Prune in the order of inputs under which 2:4 keeps the most of Wanda's score."""

    then: Pruner = field(default_factory=Wanda)
    rounds: int = 100
    seed: int = 0

    @property
    def needs(self) -> frozenset[Need]:
        return self.then.needs | Wanda.needs

    @property
    def group(self) -> Any:
        return self.then.group

    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        found = find_order(Wanda().score(weight, stats).unsqueeze(0), NM(2, 4), self.rounds, self.seed)
        places = found.places[0].to(weight.device)
        back = places.argsort()

        def ordered(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[places]

        hessian = None if stats.hessian is None else stats.hessian[places][:, places]
        seen = replace(
            stats, mean=ordered(stats.mean), var=ordered(stats.var), sqnorm=ordered(stats.sqnorm), hessian=hessian
        )
        made = self.then.prune(weight[:, places], seen, NM(2, 4))
        notes = {**made.notes, "retained_before": found.before, "retained_after": found.after}
        return replace(made, keep=made.keep[:, back], weight=made.weight[:, back], notes=notes)


def measure(key: Mapping[str, Any], ids: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prune and evaluate a row; what came out."""
    *before, method = str(key["row"]).split("+")
    opened, run = open_bundle(options.model), Run()
    bundle = Bundle(opened.live(torch.float32), opened.tokenizer)
    calibration = {"source": str(ids)}
    if before == ["permute"]:
        permute_model(bundle, PermuteConfig(pattern="2:4", calibration=calibration), run)
    settings = {"method": method, "pattern": "2:4"}
    if key["gathered"]:
        settings = {"method": {"gathered": {"then": method}}, "pattern": "0.5/row"}
    prune_model(bundle, PruneConfig(**settings, calibration=calibration), run)
    config = EvalConfig(
        source=options.data, seqlen=options.eval_seqlen, windows=options.windows, dtype="float32", backend="dense"
    )
    found = measure_model(bundle, config, run)
    return {**key, "perplexity": found["perplexity"], "date": datetime.now(UTC).isoformat(timespec="seconds")}


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, RESULT)
    parser.add_argument("--rows", default="wanda,permute+wanda,admm,permute+admm")
    options = parser.parse_args()
    about = {
        "what": "perplexity at 2:4 in an order of inputs of each linear's own, and in the order as it came",
        "command": "python benchmarks/gather_gain.py --calibration C4 --data WIKITEXT --rows ROWS",
    }
    keys = [{"row": row, "gathered": gathered} for row in options.rows.split(",") for gathered in (False, True)]
    measure_rows(
        options, open_bundle(options.model), about, keys,
        lambda key, ids, _: measure(key, ids, options),
        lambda made: f"{made['row']:16} gathered {made['gathered']!s:5} {made['perplexity']:.3f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
