"""Decoding speed of llama.cpp on GGUF files, the row that whole-model numbers are held against.

    ENV/bin/python benchmarks/llama_row.py SmolLM2-135M-Instruct.Q4_1.gguf --also q8_0,q4_0 --scratch FOLDER

ENV is an environment of its own with llama-cpp-python. ``--also`` has llama.cpp's own quantizer make other types of the
first file. One token at a time after a short prompt, always the same, so that sampling costs nothing: the median of the
runs, in which the files take turns. Weights that were rounded to 4 bits and then to 8 are no better than 4 bits: these
files are for speed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import llama_cpp
from llama_cpp import Llama

RESULT = Path(__file__).parent / "results" / "llama_cpp.json"


def quantized(source: Path, kind: str, folder: Path) -> Path:
    """``source`` in another type of weights, ``q8_0`` say."""
    to = folder / f"{source.stem}.as-{kind}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(to).encode(), params):
        raise SystemExit(f"{source}: llama.cpp cannot make {kind} of it")
    return to


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, nargs="+")
    parser.add_argument("--also", default="", help="types to make of the first file: q8_0,q4_0")
    parser.add_argument("--scratch", type=Path, default=Path(), help="folder to make them in")
    parser.add_argument("--prompt", type=int, default=128, help="tokens that are there before")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    made = [quantized(options.gguf[0], kind, options.scratch) for kind in options.also.split(",") if kind]
    llamas = {
        path: Llama(str(path), n_ctx=512, n_threads=options.threads, n_threads_batch=options.threads, verbose=False)
        for path in (*options.gguf, *made)
    }
    speeds: dict[Path, list[float]] = {path: [] for path in llamas}
    for _ in range(options.runs):
        for path, llama in llamas.items():
            llama.reset()
            for token in range(options.prompt):
                llama.eval([token])
            begun = time.perf_counter()
            for _ in range(options.tokens):
                llama.eval([1])
            speeds[path].append(options.tokens / (time.perf_counter() - begun))
    rows = []
    for path, found in speeds.items():
        row = {"file": path.name, "bytes": path.stat().st_size, "tokens_per_second": statistics.median(found)}
        rows.append(row | {"runs": found})
        print(f"{path.name}: {row['tokens_per_second']:.1f} tokens/s")
    record = {
        "what": "decoding one token at a time with llama.cpp",
        "command": f"ENV/bin/python benchmarks/llama_row.py {options.gguf[0].name} --also {options.also}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "llama_cpp_python": version("llama-cpp-python"),
        "machine": platform.platform(),
        "threads": options.threads,
        "prompt": options.prompt,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
