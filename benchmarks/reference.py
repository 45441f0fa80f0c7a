"""Time other authors' own pruning code on a CPU and keep its masks and its model.

Run this with a Python that has what that code needs: torch, numpy, scipy, pandas, datasets, accelerate and a
transformers of the time, such as 4.41.2. It must be a release whose decoder blocks turn
`position_ids` into rotary embeddings themselves and return a tuple: the code calls a block with
`attention_mask` and `position_ids` alone and takes element 0 of the answer. Nothing of compressllm
is imported.

The authors' functions run as they are. Around them is set: the data loader returns the given token ids, the model
is on the CPU, and moving a tensor to a GPU or waiting for one does nothing. `--repo` is a clone of

    magnitude, wanda, sparsegpt   https://github.com/locuslab/wanda (which carries SparseGPT's solver)
    ria                           https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning
    dsnot                         https://github.com/zyxxmu/DSnoT
    alps                          https://github.com/mazumder-lab/ALPS

    python benchmarks/reference.py --repo WANDA --model FOLDER --ids ids.npy --method sparsegpt --out result.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import platform
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BUFFER_ROWS = 128  # prepare_calibration_input allocates this many windows, whatever nsamples says
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern in the words of the reference, which counts the weights it removes.

    Args:
        removed: Weights removed of every `group`; 0 for an unstructured pattern.
        group: Length of a group along a row; 0 for an unstructured pattern.
        sparsity: Fraction removed.
    """

    removed: int
    group: int
    sparsity: float

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "N:M", which keeps N of every M, or a fraction to remove."""
        if ":" in text:
            kept, group = (int(part) for part in text.split(":"))
            return cls(group - kept, group, (group - kept) / group)
        return cls(0, 0, float(text))


@dataclass
class Stopwatch:
    """Seconds spent in chosen calls, by label; a call inside another counts for both."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def timed(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, made to add its wall time to `label`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - start

        return run


def legacy_folder(model: Path, into: Path) -> Path:
    """Lay out a model folder that transformers 4.x opens: links to the weights and an older config.

    Transformers 5 writes `dtype` for `torch_dtype` and puts `rope_theta` into `rope_parameters`,
    where an older release does not look: it would take its default base of 10000 without a word.

    Raises: ValueError if the config asks for what such a release would silently ignore.
    """
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{model}: rope type {rope['rope_type']!r} has no older spelling here")
        config["rope_theta"] = rope["rope_theta"]
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    width = config["hidden_size"] // config["num_attention_heads"]
    if (config.get("head_dim") or width) != width:
        raise ValueError(f"{model}: head_dim {config['head_dim']}, but older releases use {width}")

    into.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            (into / path.name).symlink_to(path.resolve())
    (into / "config.json").write_text(json.dumps(config, indent=2))
    return into


def load_model(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """Load a causal LM in eval mode the way the reference does, but onto the CPU."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        model = AutoModelForCausalLM.from_pretrained(
            legacy_folder(folder, Path(scratch)),
            torch_dtype=dtype,
            low_cpu_mem_usage=True,
            attn_implementation=attention,
        )
    model.hf_device_map = {}  # read by the reference; with no entry it leaves every tensor in place
    model.eval()
    return model


def stay_on_cpu() -> None:
    """Make moves to a GPU, and waits for one, do nothing. Changes torch."""
    to = Tensor.to

    def move(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], str | torch.device) and str(args[0]).startswith("cuda"):
            args = args[1:]
        return to(self, *args, **kwargs) if args or kwargs else self

    Tensor.to = move  # type: ignore[method-assign, assignment]
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]


#: What the authors' scripts take from their command lines by default, where it bears on pruning.
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {"use_variant": False},
    "sparsegpt": {},
    "ria": {
        "prune_method": "ria", "model": "llama", "calib_dataset": "c4", "a": 0.5, "reconstruction": False,
        "reallocation": False, "lsa": False, "gptq": False, "per_outneuron": False, "semi_sparse_acc": False,
    },
    "dsnot": {
        "initial_method": "wanda", "pow_of_var_regrowing": 1.0, "max_cycle_time": 50, "update_threshold": 0.1,
        "without_DSnoT": False, "without_same_sign": True, "skip_layer": "mlp", "skip_sub_layer": "no_skip",
        "get_time_overhead": False,
    },
    "alps": {"method": "ALPS"},
}  # fmt: skip


def load_reference(repo: Path, ids: np.ndarray, method: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The authors' module, its data loader replaced by the given (windows, tokens) ids, and the call that prunes."""
    sys.path.insert(0, str(repo.resolve()))
    stay_on_cpu()
    windows = [(row[None], row[None]) for row in torch.from_numpy(ids)]  # (input, unused target)
    if method == "alps":
        module = importlib.import_module("llama")
        importlib.import_module("alps").dev = "cpu"  # type: ignore[attr-defined]

        def call(args: argparse.Namespace, model: Any, *_: Any, prune_n: int, prune_m: int) -> None:
            # It counts the weights that stay, and reads its settings from the module.
            kept = prune_m - prune_n
            module.args = argparse.Namespace(**vars(args), sp=args.sparsity_ratio, nm_n=kept, nm_m=prune_m)  # type: ignore[attr-defined]
            with torch.no_grad():
                module.llama_sequential(model, windows, "cpu", nsamples=args.nsamples)

        return module, call
    module = importlib.import_module("lib.prune")
    module.get_loaders = lambda *_, **__: (windows, None)  # type: ignore[attr-defined]
    return module, getattr(module, {"dsnot": "prune_DSnoT"}.get(method, f"prune_{method}"))


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of the decoder blocks by full name, in sorted order."""
    named = model.named_modules()
    return dict(sorted((n, m) for n, m in named if isinstance(m, nn.Linear) and n.startswith("model.layers.")))


def pack_masks(model: nn.Module) -> dict[str, np.ndarray]:
    """Return, per linear, one bit a weight: 1 where it is not zero. Row-major, lowest bit first.

    The reference keeps no masks, so a weight that was zero before pruning reads as removed.
    """
    return {
        name: np.packbits((linear.weight.data != 0).numpy(), bitorder="little")
        for name, linear in block_linears(model).items()
    }


def count_zeros(model: nn.Module) -> int:
    """Count the zero weights in the linears of the decoder blocks."""
    return sum(int((linear.weight.data == 0).sum()) for linear in block_linears(model).values())


def watch_parts(prune: ModuleType, model: nn.Module) -> Stopwatch:
    """Make the reference's parts report their time. Changes the module and the model in place."""
    watch = Stopwatch()
    prune.prepare_calibration_input = watch.timed(  # type: ignore[attr-defined]
        "inputs", prune.prepare_calibration_input
    )
    prune.WrappedGPT.add_batch = watch.timed("hooks", prune.WrappedGPT.add_batch)
    for block in model.model.layers:  # type: ignore[union-attr]
        block.forward = watch.timed("blocks", block.forward)
    return watch


def split_seconds(watch: Stopwatch, total: float) -> dict[str, float]:
    """Split pruning time into first inputs, block forwards, their hooks, and choosing masks."""
    inputs, blocks, hooks = (watch.seconds[part] for part in ("inputs", "blocks", "hooks"))
    parts = {
        "inputs": inputs,
        "forward": blocks - hooks,
        "hooks": hooks,
        "select": total - inputs - blocks,
    }
    return {part: round(seconds, 3) for part, seconds in parts.items()}


def peak_rss_mib() -> float:
    """Return the largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prune once and return the measurements; save masks and model where asked."""
    pattern = Pattern.parse(options.pattern)
    ids = np.load(options.ids)[: options.samples].astype(np.int64)  # (windows, tokens)
    if len(ids) > BUFFER_ROWS:
        raise ValueError(f"{options.ids}: {len(ids)} windows; the reference holds {BUFFER_ROWS}")
    if options.threads:
        torch.set_num_threads(options.threads)

    start = time.perf_counter()
    model = load_model(options.model, DTYPES[options.dtype], options.attention)
    load_seconds = time.perf_counter() - start
    load_rss = peak_rss_mib()

    zeros_before = count_zeros(model)
    model.seqlen = ids.shape[1]
    module, method = load_reference(options.repo, ids, options.method)
    watch = watch_parts(module, model) if options.breakdown else None
    settings = {"nsamples": len(ids), "seed": 0, "seqlen": ids.shape[1], "sparsity_ratio": pattern.sparsity}
    arguments = argparse.Namespace(**settings, **SETTINGS[options.method])

    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # it prints a line per linear
        method(
            arguments,
            model,
            None,  # the tokenizer, which only the replaced data loader would use
            torch.device("cpu"),
            prune_n=pattern.removed,
            prune_m=pattern.group,
        )
    prune_seconds = time.perf_counter() - start
    prune_rss = peak_rss_mib()

    masks = pack_masks(model)
    if options.save_masks:
        shapes = {f"{name}.shape": np.array(linear.weight.shape) for name, linear in block_linears(model).items()}
        arrays: dict[str, Any] = masks | shapes
        np.savez(options.save_masks, **arrays)
    if options.save_model:
        model.save_pretrained(options.save_model)
    weights = sum(linear.weight.numel() for linear in block_linears(model).values())
    return {
        "method": options.method,
        "pattern": options.pattern,
        "dtype": options.dtype,
        "attention": options.attention,
        "windows": list(ids.shape),
        "ids_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        "threads": torch.get_num_threads(),
        "load_seconds": round(load_seconds, 3),
        "prune_seconds": round(prune_seconds, 3),
        "prune_parts": split_seconds(watch, prune_seconds) if watch else None,
        "peak_rss_mib": {"load": round(load_rss, 1), "prune": round(prune_rss, 1)},
        "linears": len(masks),
        "weights": weights,
        "zeros_before": zeros_before,
        "sparsity": count_zeros(model) / weights,
        "masks_sha256": hashlib.sha256(b"".join(m.tobytes() for m in masks.values())).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repo", type=Path, required=True, help="clone of the authors' repository")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--ids", type=Path, required=True, help=".npy of (windows, tokens) ints")
    parser.add_argument("--samples", type=int, help="use only the first so many windows")
    parser.add_argument("--method", choices=tuple(SETTINGS), default="wanda")
    parser.add_argument("--pattern", default="2:4", help='"N:M" keeps N of M; "0.5" removes half')
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--breakdown", action="store_true", help="also time the parts")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--save-masks", type=Path, help=".npz: packed bits and shape per linear")
    parser.add_argument("--save-model", type=Path, help="folder for the pruned model")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = read_options()
    measured = run(chosen)
    chosen.out.write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
