"""A run folder as a run would have left it, without one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
BLOCKS = 5


def make_measurement(window_nll: list[float], /, **changes) -> dict:
    nll = sum(window_nll) / len(window_nll)
    found = {
        "perplexity": math.exp(nll),
        "nll": nll,
        "tokens": 255 * len(window_nll),
        "windows": len(window_nll),
        "seqlen": 256,
        "dtype": "float32",
        "ids_sha256": "ab" * 32,
        "protocol": f"eval.txt, {len(window_nll)} windows of 256 tokens",
        "window_nll": window_nll,
    }
    return found | changes


def entry(stage: str, config: dict, metrics: dict, **more) -> dict:
    return {
        "stage": stage,
        "config": config,
        "seconds": 61.5,
        "peak_memory_bytes": 512_000_000,
        "metrics": metrics,
        "linears": [],
        "warnings": [],
        "model": None,
        "sha256": {},
    } | more


def manifest() -> dict:
    names = [(block, f"model.layers.{block}.{kind}") for block in range(BLOCKS) for kind in KINDS]
    rows = [
        {"linear": name, "pattern": "2:4", "sparsity": 0.5, "tokens": 4096, "error": 0.01 * (block + 1) + at / 1e4}
        for at, (block, name) in enumerate(names)
    ]
    prune = entry(
        "prune",
        {"method": {"wanda": {"power": 0.5}}, "pattern": "2:4"},
        {"linears": len(rows), "sparsity": 0.5, "masks_sha256": "cd" * 32, "bytes_before": 4e6, "bytes_after": 4e6},
        linears=rows,
        block_seconds={f"model.layers.{block}": 1.5 + block for block in range(BLOCKS)},
        warnings=["<b>few</b> tokens & a | bar"],
    )
    recover = entry(
        "recover",
        {"masking": "ast", "losses": "kl=1.0"},
        {"held_out_perplexity": {"before": 9.0, "after": 7.0, "teacher": 5.0}, "gap_closed": 0.5, "sparsity": 0.5},
    )
    export = entry(
        "export",
        {"format": "packed"},
        {"bytes_before": 4e6, "bytes_after": 2.5e6},
        model="model",
        sha256={"model.packed.safetensors": "ef" * 32},
    )
    windows = [1.5 + 0.01 * at for at in range(20)]
    return {
        "schema": 1,
        "model": "tiny/model",
        "source": "model",
        "seed": 3,
        "begun": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:10:00+00:00",
        "environment": {"python": "3.11.7", "versions": {"torch": "2.13.0"}, "memory_bytes": 16e9, "gpu": None},
        "stages": [
            entry("eval", {}, make_measurement(windows)),
            prune,
            recover,
            export,
            entry("eval", {}, make_measurement([nll + 0.1 for nll in windows])),
        ],
    }


def training() -> list[dict]:
    rows = [{"step": 0, "held_out_nll": 2.2, "held_out_perplexity": math.exp(2.2)}]
    for step in range(1, 41):
        rows.append(
            {"step": step, "loss": 2 / step, "kl": 2 / step, "lr": 1e-3 * (1 - step / 50), "tokens": 1024 * step}
        )
        if step % 5 == 0:
            rows[-1] |= {"flip_rate": 0.01 / step, "flip_rate_from_first": 0.001 * step}
            rows.append({"step": step, "held_out_nll": 2.2 - 0.006 * step})
    return rows


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Eval, prune, recover, export, eval."""
    return write_run(tmp_path / "run")


def write_run(folder: Path) -> Path:
    (folder / "03-recover").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest()))
    (folder / "recipe.yaml").write_text("model: tiny/model  # <made up>\nstages: []\n")
    lines = "".join(json.dumps(row) + "\n" for row in training())
    (folder / "03-recover" / "metrics.jsonl").write_text(lines + '{"step": 41, "lo')  # cut short by a kill
    return folder


@pytest.fixture
def measurement() -> Callable[..., dict]:
    """``measurement(losses by window, key=other value)``, as eval gives it."""
    return make_measurement


@pytest.fixture
def sweep() -> dict:
    """What a sweep's file holds."""
    return make_sweep()


def make_sweep() -> dict:
    points = [
        {"pattern": "dense" if not at else f"0.{at}", "sparsity": at / 10, "nll": 1.5 + (at / 8) ** 6, "tokens": 9}
        for at in range(9)
    ]
    for point in points:
        point["perplexity"] = math.exp(point["nll"])
    return {
        "schema": 1,
        "sweep": {"model": "tiny/model", "seed": 0},
        "begun": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:00+00:00",
        "environment": {"python": "3.11.7"},
        "points": points,
        "knee": {"rise": 0.01, "loss": points[3], "perplexity": points[3], "chord": None},
        "protocol": {"protocol": "eval.txt, 20 windows"},
    }
