"""What rounding the inputs of integer linears to int8 does to perplexity: `native` against `native-exact`.

    python benchmarks/rounded_inputs.py PRUNED

PRUNED is a 2:4 checkpoint, whose weights are rounded as they are read, group by group to the largest. Both backends
then run the same codes on the same token ids. A CPU with matrix units rounds the inputs of a few tokens only, so that
prompts show nothing: --isa avx2 has the vector kernels take them, whose sums are the same for one token and for many.
Rows that the result file has already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from compressllm.calibration.windows import evaluation_windows
from compressllm.eval.config import EvalConfig
from compressllm.eval.perplexity import perplexity
from compressllm.kernels.native.library import CHOSEN_ISA
from compressllm.models.bundle import open_bundle
from compressllm.stages.environment import environment
from compressllm.stages.evaluate import prepare_linears

RESULT = Path(__file__).parent / "results" / "rounded_inputs.json"
ROWS = [("native", None), *((backend, bits) for bits in (8, 4) for backend in ("native-exact", "native"))]


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="a 2:4 checkpoint")
    parser.add_argument("--data", default="builtin", help="text to measure on")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="only the first so many")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--isa", help="the highest instruction set to use; the machine's best unless given")
    options = parser.parse_args()
    os.environ["COMPRESSLLM_MEASURE"] = "0"
    if options.isa:
        os.environ[CHOSEN_ISA] = options.isa
    bundle = open_bundle(options.pruned)
    windows = evaluation_windows(
        options.data,
        bundle.tokenizer,
        seqlen=options.seqlen,
        limit=options.windows,
        max_seqlen=bundle.max_seqlen,
        vocab_size=bundle.vocab_size,
    )
    record = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    for backend, bits in ROWS:
        key = {
            "backend": backend,
            "weights": f"int{bits}, group 64" if bits else "bf16",
            "ids_sha256": windows.sha256,
            "isa": options.isa,
        }
        if any(key.items() <= row.items() for row in record["rows"]):
            continue
        config = EvalConfig(dtype="bfloat16", device="cpu", backend=backend)
        result = perplexity(prepare_linears(bundle, config, bits)[0], windows.ids)
        record["rows"].append(key | {"perplexity": result.perplexity, "nll": result.nll, "tokens": result.tokens})
        record |= {
            "what": "perplexity of a 2:4 model with inputs of integer linears rounded to int8, and not",
            "command": "python benchmarks/rounded_inputs.py PRUNED" + (f" --isa {options.isa}" if options.isa else ""),
            "pruned": Path(options.pruned).resolve().name,
            "protocol": f"{windows.rule}; {result.protocol}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
        }
        print(f"{key['weights']:16} {backend:14} {result.perplexity:.4f}", flush=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
