"""Tokens a second of a recovery step against a plain distillation loop with torch's and transformers' defaults.

Both train the same pruned model towards the same teacher on the same windows: KL at the head, AdamW, clipping, and what
keeps pruned weights zero. The plain loop multiplies weights by their masks after every step, as research code does.

    python benchmarks/recover_speed.py STUDENT --teacher MODEL --data TEXT --steps 4
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from compressllm.core.compute import choose_device
from compressllm.core.run import Run
from compressllm.models.bundle import open_bundle
from compressllm.recover.config import RecoverConfig
from compressllm.recover.data import load_data
from compressllm.recover.loop import Training
from compressllm.recover.model import recover_model
from compressllm.stages.environment import PeakMemory, environment

#: Wall and CPU seconds of a step.
Seconds = tuple[float, float]


def plain_loop(student: str, config: RecoverConfig, autocast: bool) -> list[Seconds]:
    """Seconds of each step of the plain loop."""
    bundle, device = open_bundle(student), choose_device(config.device)
    rows = load_data(config, bundle, Run()).train
    model = bundle.live(torch.float32, device).train().requires_grad_(True)
    teacher = open_bundle(str(config.teacher)).live(torch.float32, device)
    masks = {name: (model.get_submodule(name).weight, bundle.masks[name].to(device)) for name in bundle.masks}
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    count, size = config.windows_per_step, config.micro_batch
    seconds = []
    for step in range(config.steps):
        begun = time.perf_counter(), time.process_time()
        for start in range(0, count, size):
            ids = rows.batch(range(step * count + start, step * count + start + size))["input_ids"].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                with torch.no_grad():
                    wanted = F.softmax(teacher(input_ids=ids).logits[:, :-1].float(), dim=-1)
                told = F.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)
                loss = F.kl_div(told, wanted, reduction="sum") / (count * (ids.shape[1] - 1))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, keep in masks.values():
                weight.mul_(keep)
        loss.item()
        seconds.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return seconds


def our_loop(student: str, config: RecoverConfig) -> list[Seconds]:
    """Seconds of each step of `recover`."""
    seconds: list[Seconds] = []
    step = Training._step

    def timed(self: Training, *given: Any) -> Any:
        begun = time.perf_counter(), time.process_time()
        told = step(self, *given)
        seconds.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        return told

    Training._step = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            recover_model(open_bundle(student), config, Run(folder=Path(folder)))
    finally:
        Training._step = step  # type: ignore[method-assign]
    return seconds


def measured(run: Callable[[], list[Seconds]], tokens: int) -> dict[str, Any]:
    """What came out, the first step left aside where there are others."""
    memory = PeakMemory()
    seconds = run()
    wall, cpu = (statistics.median(part[1:] or part) for part in zip(*seconds, strict=True))
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "peak_memory_bytes": memory.bytes(),
    }


def main() -> None:
    """Measure both and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--masking", default="fixed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of our matrix products")
    parser.add_argument("--autocast", action="store_true", help="The plain loop in bfloat16 autocast.")
    parser.add_argument("--teacher-cache", type=int, help="tokens kept; the cache is of all of --data, so give few")
    parser.add_argument("--only", choices=("plain", "ours"), help="One of the two, for its peak memory.")
    given = parser.parse_args()
    config = RecoverConfig(
        teacher=given.teacher, data=(given.data,), seqlen=given.seqlen, batch_tokens=given.batch_tokens,
        micro_batch=given.micro_batch, masking=given.masking, device=given.device, dtype=given.dtype, held_out=0.001,
        max_tokens=given.steps * given.batch_tokens, evaluate_every=1.0, save_every=1.0,
    )  # fmt: skip
    tokens = config.windows_per_step * config.seqlen
    result: dict[str, Any] = {"tokens_a_step": tokens, **vars(given)}
    if given.only != "ours":
        result["plain"] = measured(lambda: plain_loop(given.student, config, given.autocast), tokens)
    if given.only != "plain":
        result["ours"] = measured(lambda: our_loop(given.student, config), tokens)
    if given.teacher_cache:
        cached = config.model_copy(update={"teacher_cache": given.teacher_cache})
        result["cached"] = measured(lambda: our_loop(given.student, cached), tokens)
    if given.only is None:
        for row in ("ours", "cached"):
            for rate in ("tokens_per_second", "tokens_per_cpu_second") if row in result else ():
                result[row]["times_" + rate] = result[row][rate] / result["plain"][rate]
    print(json.dumps({**result, "environment": environment()}, indent=2))


if __name__ == "__main__":
    main()
