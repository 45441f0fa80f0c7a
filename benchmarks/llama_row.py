"""Decoding speed of llama.cpp on a GGUF file, the row that whole-model numbers are held against.

    ENV/bin/python benchmarks/llama_row.py SmolLM2-135M-Instruct.Q4_1.gguf

ENV is an environment of its own with llama-cpp-python. A short prompt, then one token at a time, greedily; the median
of the runs.
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

from llama_cpp import Llama

RESULT = Path(__file__).parent / "results" / "llama_cpp.json"


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = []
    for path in options.gguf:
        llama = Llama(str(path), n_ctx=512, n_threads=options.threads, n_threads_batch=1, verbose=False)
        speeds = []
        for _ in range(options.runs):
            llama.reset()
            for token in llama.tokenize(b"The capital of France is"):
                llama.eval([token])
            begun = time.perf_counter()
            for _ in range(options.tokens):
                llama.eval([llama.sample(temp=0.0)])
            speeds.append(options.tokens / (time.perf_counter() - begun))
        rows.append({"file": path.name, "tokens_per_second": statistics.median(speeds), "runs": speeds})
        print(f"{path.name}: {rows[-1]['tokens_per_second']:.1f} tokens/s")
    record = {
        "what": "decoding one token at a time with llama.cpp",
        "command": "ENV/bin/python benchmarks/llama_row.py " + " ".join(path.name for path in options.gguf),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "llama_cpp_python": version("llama-cpp-python"),
        "machine": platform.platform(),
        "threads": options.threads,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
