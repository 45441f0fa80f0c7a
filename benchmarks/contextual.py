"""What few neurons cost a real model, and what correction brings back: quality, advance, densities and speed.

    python benchmarks/contextual.py --rows griffin:0.3,griffin:0.5,griffin:0.7

A row is a selector and a density; by default every selector at 0.3, 0.5 and 0.7. Each is measured without correction
and with it, and the dense model beside it in the same process. Rows that the result file has already are not measured
again, so a stopped run goes on; what a selector learns from text is kept in --calibrations and used again. So are the
dense model's texts and answers, of which a later process generates a few anew to hold its own speed against.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibrated import Row

from compressllm.calibration.windows import evaluation_windows, load_windows
from compressllm.contextual.attach import Contextual
from compressllm.contextual.calibrate import calibrate, calibration_path, find_calibration, save_calibration
from compressllm.contextual.evaluate import Reference, Trial, measure_dense, measure_density, tradeoff
from compressllm.contextual.fidelity import DENSE, generate_all, prompts_of
from compressllm.contextual.probes import Answers, make_items
from compressllm.contextual.sirius import Sirius
from compressllm.core.protocols import NEURON_SELECTORS
from compressllm.core.registry import build
from compressllm.models.bundle import open_bundle
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "contextual.json"
DENSITIES = (0.3, 0.5, 0.7)
_TIMED = 2  # prompts that a later process times the dense model on


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", help="SELECTOR:DENSITY, comma-separated")
    parser.add_argument("--period", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--source", default="builtin", help="text to measure on, and to calibrate on")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--probes", type=int, default=8, help="questions of each probe")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument(
        "--calibrations", type=Path, default=Path("calibrations"), help="folder to keep calibrations in"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in the file")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    """Measure the rows that the file lacks, and keep it up to date."""
    asked = options()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    names = NEURON_SELECTORS.names()
    wanted = (
        [part.split(":") for part in asked.rows.split(",")]
        if asked.rows
        else [[n, d] for n in names for d in DENSITIES]
    )
    bundle = open_bundle(asked.model)
    windows = evaluation_windows(asked.source, bundle.tokenizer, asked.seqlen, asked.windows)
    settings: Row = {
        key: getattr(asked, key)
        for key in ("model", "period", "threshold", "prompt_tokens", "new_tokens", "probes", "dtype")
    } | {"ids_sha256": windows.sha256, "calibration_windows": asked.calibration_windows}
    record: Row = {"settings": settings, "rule": windows.rule, "results": []}
    if asked.out.exists():
        record = json.loads(asked.out.read_text())
        if record["settings"] != settings:
            sys.exit(f"{asked.out}: was measured with other settings; name another file")
    record["environment"], record["command"] = environment(), "python benchmarks/contextual.py"
    model = bundle.live(getattr(torch, asked.dtype))
    trial = Trial(windows.ids, asked.prompt_tokens, asked.new_tokens, make_items(asked.probes))
    corrector = Sirius(period=asked.period, threshold=asked.threshold)
    reference: Reference | None = None
    for selector, text in wanted:
        key = {"selector": selector, "density": float(text)}
        have = [row for row in record["results"] if key.items() <= row.items()]
        if have and not asked.again:
            continue
        contextual = Contextual(model, selector, key["density"], fitted(asked, bundle.tokenizer, model, selector))
        if reference is None:
            reference = known_reference(record, contextual, trial)
        if reference is None:
            reference = measure_dense(contextual, bundle.tokenizer, trial)
            right = reference.answers.right if reference.answers else None
            record["dense"] = {**reference.facts(), "texts_made": reference.texts.tokens, "right": right}
            asked.out.write_text(json.dumps(record, indent=1) + "\n")
            print("dense:", line(tradeoff(reference, [])[0]), flush=True)
        point = measure_density(contextual, bundle.tokenizer, trial, reference, corrector)
        contextual.detach_()
        rows = tradeoff(reference, [point])[1:]
        made = {**key, "threads": torch.get_num_threads(), "point": point, "tradeoff": rows}
        record["results"] = [row for row in record["results"] if row not in have] + [made]
        for row in rows:
            print(f"{selector} {text} {row['kind']}:", line(row), flush=True)
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


def known_reference(record: Row, contextual: Contextual, trial: Trial) -> Reference | None:
    """What an earlier process found of the dense model, with this one's speed."""
    if "dense" not in record:
        return None
    dense, again = record["dense"], prompts_of(trial.windows[:_TIMED], trial.prompt_tokens)
    texts = replace(generate_all(contextual, again, trial.new_tokens, DENSE), tokens=dense["texts_made"])
    return Reference(texts, Answers(dense["right"], texts) if dense["right"] else None)


def fitted(asked: argparse.Namespace, tokenizer: Any, model: Any, selector: str) -> dict[str, torch.Tensor]:
    """What the selector learns from text, kept from run to run."""
    if not build(NEURON_SELECTORS, selector).calibrated:
        return {}
    asked.calibrations.mkdir(exist_ok=True)
    if known := find_calibration(asked.calibrations, selector):
        return known
    windows = load_windows(asked.source, tokenizer, asked.calibration_windows, asked.seqlen)
    made = calibrate(model, selector, windows.ids)
    save_calibration(calibration_path(asked.calibrations, selector), selector, made, windows.facts())
    return made


def line(row: Row) -> str:
    """The numbers of a row of the trade-off."""
    return ", ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))


if __name__ == "__main__":
    main()
