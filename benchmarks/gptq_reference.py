"""GPTQ of llm-compressor and of ours on a dense model, calibrated and evaluated on the same token ids.

    ENV/bin/python benchmarks/gptq_reference.py --model demo --calibration C4 --data WIKITEXT --rows theirs,ours,dense

ENV holds llmcompressor and this project. A row is ``dense``, ``ours`` or ``theirs`` with columns as they come, or
``ours:activation`` and ``theirs:static``, with those of large inputs first. Rows that the file has are not measured
again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compressllm.calibration.windows import evaluation_windows, load_windows
from compressllm.core.run import Run
from compressllm.eval.perplexity import perplexity
from compressllm.models.bundle import open_bundle
from compressllm.models.loading import load_model
from compressllm.quantize.config import QuantizeConfig
from compressllm.quantize.model import quantize_model
from compressllm.stages.environment import environment

HERE = Path(__file__).parent


def theirs(model: Any, ids: torch.Tensor, group: int, order: str | None) -> dict[str, Any]:
    """Quantise the model's blocks in place by llm-compressor; weights then are what their codes stand for."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(  # which takes columns by size unless told not to
        config_groups={"group_0": scheme}, actorder=order, ignore=["lm_head"], dampening_frac=0.01
    )
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    oneshot(
        model=model, dataset=Dataset.from_list(rows), recipe=[modifier], max_seq_length=ids.shape[1],
        num_calibration_samples=len(rows), shuffle_calibration_samples=False,
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "quantization_status"):
            module.quantization_enabled = False  # the weights are rounded already
    return {"llmcompressor": importlib.metadata.version("llmcompressor")}


def main() -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="which windows are calibrated on; a file for each")
    parser.add_argument("--group", type=int, default=64, help="theirs wants one that divides every row")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rows", default="dense,ours,theirs,ours:activation,theirs:static")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gptq_reference.json")
    options = parser.parse_args()

    bundle = open_bundle(options.model)
    calibration = load_windows(options.calibration, bundle.tokenizer, options.samples, options.seqlen, options.seed)
    text = evaluation_windows(options.data, bundle.tokenizer, seqlen=options.eval_seqlen, limit=options.windows)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    record |= {
        "what": f"WikiText-2 raw test perplexity of a dense model rounded to int4-g{options.group} by GPTQ",
        "command": "ENV/bin/python benchmarks/gptq_reference.py, see benchmarks/README.md",
        "model": options.model,
        "calibration": calibration.facts() | {"source": Path(options.calibration).name},
        "environment": environment(),
    }
    for row in options.rows.split(","):
        if any(one["row"] == row for one in record["results"]):
            continue
        begun, facts = time.perf_counter(), dict[str, Any]()
        kind, _, order = row.partition(":")
        if kind == "ours":
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "ids.npy"
                import numpy as np

                np.save(source, calibration.ids.numpy())
                settings = {"source": str(source), "samples": options.samples, "seqlen": options.seqlen}
                method = {"gptq": {"order": order or "natural"}}
                config = QuantizeConfig(
                    scheme=f"int4-g{options.group}", method=method, dtype="float32", calibration=settings
                )
                made = quantize_model(bundle, config, Run(folder=Path(folder)))
                model = made.live(torch.float32)
        else:
            model = load_model(options.model, torch.float32)
            if kind != "dense":
                facts = theirs(model, calibration.ids, options.group, order or None)
        seconds = time.perf_counter() - begun
        with torch.inference_mode():
            result = perplexity(model, text.ids)
        found = {"row": row, "perplexity": result.perplexity, "seconds": seconds, **facts}
        found["protocol"] = f"{text.rule}; {result.protocol}".replace(options.data, Path(options.data).name)
        found["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        record["results"].append(found)
        print(f"{row:16} {result.perplexity:10.4f} {seconds:8.1f} s", flush=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
