"""Rows of a table that are all calibrated on the same token ids, measured one by one into a JSON file."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressllm.calibration.windows import load_windows
from compressllm.models.bundle import Bundle
from compressllm.stages.environment import environment

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser, result: Path) -> None:
    """What such benchmarks are told alike."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="c4", help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--seed", type=int, default=0, help="which windows are drawn")
    parser.add_argument("--data", default="wikitext2", help="WikiText-2 raw test: wikitext2, or a file of its rows")
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="only the first so many")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in the file")
    parser.add_argument("--out", type=Path, default=result)


def measure_rows(
    options: argparse.Namespace,
    bundle: Bundle,
    about: Mapping[str, Any],
    keys: Iterable[Row],
    measure: Callable[[Row, Path, Path], Row],
    show: Callable[[Row], str],
) -> None:
    """Measure the rows that the file lacks, print each, and keep the file up to date.

    Args:
        about: What the file says of itself besides calibration and machine.
        keys: What tells one row from another.
        measure: Makes a row, which has its key in it, from the key, the file of token ids and a scratch folder.
        show: The line to print.
    """
    windows = load_windows(options.calibration, bundle.tokenizer, options.samples, options.seqlen, options.seed)
    facts = windows.facts() | {"source": Path(str(options.calibration)).name}
    record: Row = {"results": []}
    if options.out.exists():
        record = json.loads(options.out.read_text())
        if record["calibration"]["ids_sha256"] != facts["ids_sha256"]:
            sys.exit(f"{options.out}: was measured with other calibration ids; name another file")
    record |= {**about, "model": options.model, "calibration": facts, "environment": environment()}
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.npy"
        np.save(ids, windows.ids.numpy())
        for key in keys:
            have = [one for one in record["results"] if key.items() <= one.items()]
            if have and not options.again:
                continue
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = measure(key, ids, Path(scratch))
            record["results"] = [one for one in record["results"] if one not in have] + [made]
            print(show(made), flush=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")
