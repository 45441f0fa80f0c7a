"""What PASER's choice of recovery data does, and what it costs.

    python benchmarks/selection.py agreement --data INSTRUCT.jsonl.gz
    python benchmarks/selection.py scale --data INSTRUCT.jsonl.gz --folder SCRATCH
    python benchmarks/selection.py damage --data INSTRUCT.jsonl.gz --model demo --capability code --folder SCRATCH

`agreement`: how well clusters of prompts agree with labels they were not shown, beside K-means on the embeddings
themselves. `scale`: seconds and peak memory of the choice by number of records, models left out, and the models' own
rates. `damage`: a model of which a few weights that one capability uses are set to zero; what the choice makes of it.
All write into results/select.json. Records need `capability`, a label, beside instruction, input and output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from prune_speed import run_process
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressllm.core.protocols import EMBEDDERS, Embedder
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.models.bundle import open_bundle
from compressllm.select.clustering import Clustering
from compressllm.select.config import SelectConfig
from compressllm.select.encoding import Encoded, encode
from compressllm.select.layout import flat_map
from compressllm.select.paser import Paser
from compressllm.select.records import Record, read_records
from compressllm.stages.environment import environment
from compressllm.stages.selection import select_file

SETTINGS: dict[str, Any] = {"budget": 0.2, "dtype": "float32"}
RESULT = Path(__file__).parent / "results" / "select.json"


def no_hidden(texts: Any) -> Tensor:
    raise RuntimeError("this embedder needs no hidden states")


def vectors(records: list[Record], embedder: str) -> Tensor:
    return build(EMBEDDERS, embedder).embed([one.prompt for one in records], no_hidden, torch.device("cpu"), Run())


def agreement(options: argparse.Namespace) -> dict[str, Any]:
    """Normalised mutual information with the labels: PASER's clusters, K-means on the embeddings, chance."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    records, faults = read_records(options.data)
    labels = [one.row["capability"] for one in records]
    rows = []

    def add(method: str, embedder: str, clusters: Any) -> None:
        row = {
            "method": method,
            "embedder": embedder,
            "clusters": len(set(clusters.tolist())),
            "nmi": normalized_mutual_info_score(labels, clusters),
            "ari": adjusted_rand_score(labels, clusters),
        }
        print(row, flush=True)
        rows.append(row)

    for embedder in ("minilm", "tfidf"):
        points = vectors(records, embedder)
        found = Clustering().divide(points, 0, Run())
        add("paser, K by eigengap", embedder, found.labels)
        count = int(found.labels.max()) + 1
        for k in sorted({count, len(set(labels))}):
            if k != count:
                add("paser, K given", embedder, Clustering(fewest=k, most=k).divide(points, 0, Run()).labels)
            add("k-means on the embeddings", embedder, KMeans(k, n_init=3, random_state=0).fit(points.numpy()).labels_)
        shuffled = found.labels[torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).numpy()]
        add("chance: paser's labels shuffled", embedder, shuffled)
    return {"records": len(records), "left_out": faults.as_json(), "labels": dict(Counter(labels)), "rows": rows}


class FakePool:
    """As many records as asked for, without models: vectors near those of real prompts, and made-up divergences."""

    def __init__(self, records: list[Record], points: Tensor, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        source = torch.arange(count) % len(records)
        self.prompts = [f"{records[one].prompt} ({number})" for number, one in enumerate(source.tolist())]
        noise = torch.randn(count, points.shape[1], generator=generator) * 0.3 / points.shape[1] ** 0.5
        self._points = torch.nn.functional.normalize(points[source] + (noise if count > len(records) else 0))
        self.response_lengths = torch.randint(2, 200, (count,), generator=generator)
        self.lengths = self.response_lengths + 50
        self._divergence = torch.rand(count, 2, generator=generator)

    def divergence(self, ids: Any) -> Tensor:
        return self._divergence[list(ids)]

    def embeddings(self, embedder: Embedder) -> Tensor:
        return self._points


def one_size(options: argparse.Namespace) -> None:
    """In a process of its own: the whole choice of one size, models left out."""
    records = read_records(options.data)[0][: options.size]
    points = load_file(options.folder / "points.safetensors")["points"][: options.size]
    pool = FakePool(records, points, options.size)
    del records, points
    begun = time.perf_counter()
    chosen = Paser().select(pool, options.size // 5, Run())
    seconds = time.perf_counter() - begun
    assert len(set(chosen.ids)) == options.size // 5
    flat_map(chosen.coordinates, 0)
    clusters = chosen.notes["clustering"]["clusters"]
    print(json.dumps({"seconds": seconds, "map_seconds": time.perf_counter() - begun - seconds, "clusters": clusters}))


def scale(options: argparse.Namespace) -> dict[str, Any]:
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "points.safetensors").exists():
        points = vectors(read_records(options.data)[0], "minilm")
        save_file({"points": points}, options.folder / "points.safetensors")
    before = json.loads(RESULT.read_text()).get("scale", {}).get("rows", []) if RESULT.exists() else []
    rows = [row for row in before if row["records"] not in options.sizes]
    for size in options.sizes:
        command = [sys.executable, __file__, "one-size", "--data", str(options.data), "--size", str(size)]
        command += ["--folder", str(options.folder)]
        process_seconds, peak, text = run_process(command)
        row = {"records": size, **json.loads(text), "process_seconds": process_seconds, "peak_bytes": peak}
        row["loadavg"] = os.getloadavg()[0]
        print(row, flush=True)
        rows.append(row)
    rows.sort(key=lambda row: row["records"])
    return {"rows": rows, "what": "embeddings and divergences given; 50,000 are made by moving vectors of real prompts"}


def damage_model_(model: Any, ratio: dict[str, Tensor], fraction: float) -> None:
    """Zero that fraction of the linears' weights, those with the largest ratio. Changes the model in place."""
    everything = torch.cat([one.flatten() for one in ratio.values()])
    limit = everything.kthvalue(math.ceil((1 - fraction) * everything.numel())).values
    for name, module in model.named_modules():
        if name in ratio:
            module.weight.data[ratio[name] > limit] = 0


def use_ratio(model: Any, wanted: list[Encoded], others: list[Encoded]) -> dict[str, Tensor]:
    """For each block weight, how much more one kind of record uses it than the others do.

    A weight's use is its empirical Fisher information: times its square that estimates what the loss rises without it.
    """
    linears = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    model.requires_grad_(False)
    for weight in linears.values():
        weight.requires_grad_(True)

    def fisher(records: list[Encoded]) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(weight) for name, weight in linears.items()}
        for done, one in enumerate(records):
            ids = torch.tensor([one.ids])
            target = ids.clone()
            target[:, : one.start] = -100
            model(input_ids=ids, labels=target).loss.backward()
            for name, weight in linears.items():
                sums[name].addcmul_(weight.grad, weight.grad, value=1 / len(records))
                weight.grad = None
            print(f"{done + 1} of {len(records)} gradients", flush=True)
        return sums

    mine, theirs = fisher(wanted), fisher(others)
    model.requires_grad_(False)
    # Of the weights that matter to the wanted records, those that matter least to the others.
    return {
        name: (mine[name] * weight.detach() ** 2) / (theirs[name] + theirs[name].mean())
        for name, weight in linears.items()
    }


def damage(options: argparse.Namespace) -> dict[str, Any]:
    """Damage one capability, choose records, and compare the budgets of clusters by their share of that capability."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    records = read_records(options.data)[0]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    pool: list[int] = []
    taken: Counter[str] = Counter()
    for one in order:  # as many of each label
        taken[label := records[one].row["capability"]] += 1
        if taken[label] <= options.each:
            pool.append(one)
    inside = set(pool)
    rest = [one for one in order if one not in inside]
    data = folder / "pool.jsonl"
    data.write_text("".join(json.dumps(records[one].row) + "\n" for one in sorted(pool)))
    bundle = open_bundle(options.model)
    student = folder / f"damaged-{options.fraction:g}"
    if not (student / "config.json").exists():
        model = bundle.live(torch.float32)
        ratios = folder / f"ratio-{options.capability}-{options.examples}.safetensors"
        if not ratios.exists():
            kinds: dict[bool, list[Encoded]] = {True: [], False: []}
            for one in rest:
                kind = kinds[records[one].row["capability"] == options.capability]
                if len(kind) < options.examples:
                    kind.append(encode(records[one], bundle.tokenizer, 192))
            save_file(use_ratio(model, kinds[True], kinds[False]), ratios)
        damage_model_(model, load_file(ratios), options.fraction)
        model.to(torch.bfloat16).save_pretrained(student)
        bundle.tokenizer.save_pretrained(student)
    shares = {}
    for share in ("records", "clusters"):
        out = folder / f"{share}.jsonl"
        for path in (out, out.with_suffix(".report.json")):
            path.unlink(missing_ok=True)
        config = SelectConfig(
            method={"paser": {"share": share, "oversample": 0.0}}, **SETTINGS, max_tokens=options.max_tokens
        )
        report = select_file(data, out, options.model, str(student), config, seed=0)
        report.pop("environment")
        chosen = [json.loads(line) for line in out.read_text().splitlines()]
        shares[share] = {
            "seconds": report["seconds"],
            "clusters": report["clusters"],
            "chosen_by_capability": dict(Counter(row["capability"] for row in chosen)),
        }
    usable = [json.loads(line) for line in data.read_text().splitlines()]
    return {
        "model": options.model,
        "capability": options.capability,
        "examples": options.examples,
        "fraction_zeroed": options.fraction,
        "records": len(usable),
        "of_capability": dict(Counter(row["capability"] for row in usable)),
        "divergence_by_capability": by_capability(data, options, student),
        "share": shares,
    }


def by_capability(data: Path, options: argparse.Namespace, student: Path) -> dict[str, float]:
    """Mean Jensen-Shannon divergence of the records of each label; all of it is in the cache by now."""
    from compressllm.select.pool import Pool

    records = read_records(data)[0]
    config = SelectConfig(**SETTINGS, max_tokens=options.max_tokens)
    pool = Pool(records, open_bundle(options.model), open_bundle(str(student)), config, Run())
    divergence = pool.divergence(range(len(records)))[:, 0]
    sums: dict[str, list[float]] = {}
    for record, value in zip(records, divergence.tolist(), strict=True):
        sums.setdefault(record.row["capability"], []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(sums.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("agreement", "scale", "damage", "one-size"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--capability", default="code")
    parser.add_argument("--examples", type=int, default=16, help="records of either kind that choose what to damage")
    parser.add_argument("--fraction", type=float, default=1.9e-6, help="of the weights of all linears, set to zero")
    sizes = "1000,5000,20000,50000"
    parser.add_argument("--sizes", type=lambda text: [int(one) for one in text.split(",")], default=sizes)
    parser.add_argument("--each", type=int, default=6, help="records of each label to choose from")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a record")
    parser.add_argument("--size", type=int, help="records of one process of the scale")
    parser.add_argument("--folder", type=Path, help="scratch folder")
    options = parser.parse_args()
    if options.part == "one-size":
        one_size(options)
        return
    made = {"agreement": agreement, "scale": scale, "damage": damage}[options.part](options)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results[options.part] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/selection.py {options.part} --data {options.data.name}",
        "data_sha256": hashlib.sha256(options.data.read_bytes()).hexdigest(),
        "environment": environment(),
        "loadavg": os.getloadavg()[0],
        **made,
    }
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
