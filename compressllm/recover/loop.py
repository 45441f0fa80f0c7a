"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from compressllm.core.errors import TrainingError
from compressllm.core.finite import first_not_finite, said_of
from compressllm.core.halving import Halving
from compressllm.core.run import Run
from compressllm.recover.checkpoint import Checkpoints
from compressllm.recover.config import RecoverConfig, rate_of
from compressllm.recover.gradients import Gradients, clip_
from compressllm.recover.guide import Guide
from compressllm.recover.heldout import HeldOut, count_labels
from compressllm.recover.masking import Masking
from compressllm.recover.metrics import Metrics
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.passes import can_run_apart, run_apart
from compressllm.recover.progress import Progress
from compressllm.recover.rows import Order, Rows
from compressllm.recover.sharding import Sharding
from compressllm.recover.student import Student


@dataclass
class Training:
    """All that a training step touches."""

    accelerator: Accelerator
    student: Student
    guide: Guide
    data: Rows
    held_out: HeldOut
    optimizer: Optimizer
    gradients: Gradients
    masking: Masking
    sharding: Sharding
    checkpoints: Checkpoints
    config: RecoverConfig
    run: Run
    halving: Halving = field(init=False)

    def __post_init__(self) -> None:
        self.halving = Halving(self.run.warn)

    def train_(self) -> Progress:
        """Train to the last step, from the last checkpoint if there is one, and leave the best weights in place.

        Raises: TrainingError if the loss is not finite or training diverges; the last checkpoint stays.
        """
        steps = self.config.steps
        done = self.checkpoints.resume_()
        progress = Progress(**self.checkpoints.facts) if done else Progress()
        metrics = Metrics(self.run.folder if self.sharding.ranks.rank == 0 else None, resumed=done)
        if not done:
            self.checkpoints.begin()
            progress.before = self._measure(progress, metrics)
            if self.guide.teacher:
                progress.teacher = self.held_out.teacher_nll(self.guide.teacher)
        looks, saves = (max(1, round(share * steps)) for share in (self.config.evaluate_every, self.config.save_every))
        order = Order(len(self.data), self.run.seed)
        self._label = "recovering"
        for step in self.run.track(range(done, steps), steps - done, lambda: self._label):
            row = self._step(step, order, progress)
            if self.masking.refreshes(step + 1):
                progress.masks = self._refresh_(step + 1)
                row |= progress.masks
            metrics.write(step=step + 1, **row)
            if (step + 1) % looks == 0 or step + 1 == steps:
                self._measure(progress, metrics)
            if (step + 1) % saves == 0 and step + 1 < steps:
                metrics.sync()
                self.checkpoints.save(step + 1, vars(progress))
        if progress.best["name"]:
            self.checkpoints.load_best_(progress.best["name"])
        return progress

    def _step(self, step: int, order: Order, progress: Progress) -> dict[str, float]:
        """One optimizer step, counted into ``progress``; what is told of it."""
        begun = time.perf_counter()
        sums: dict[str, Tensor] | None = None
        while sums is None:
            batches = [(rows, self.data.batch(rows)) for rows in self._micro_batches(step, order)]
            counts = [
                float(sum(count_labels(batch) for _, batch in batches)),
                float(sum(batch["input_ids"].numel() for _, batch in batches)),
            ]
            labels, tokens = self.sharding.total(torch.tensor(counts)).tolist()
            sums = self._summed(batches, labels)
        losses = self._finite(step, sums, batches)
        gradients = self.gradients.collect()
        self.sharding.sum_gradients_(gradients)
        self.masking.clean_(gradients)
        norm = clip_(gradients, self.config.clip, self.sharding.total_of_shards)
        rate = rate_of(step, self.config)
        self.optimizer.step_(gradients, rate)
        self.gradients.clear_()
        took = time.perf_counter() - begun
        progress.step, progress.tokens, progress.seconds = (
            step + 1, progress.tokens + int(tokens), progress.seconds + took,
        )  # fmt: skip
        speed = tokens / took
        self._label = f"{', '.join(f'{name} {value:.3f}' for name, value in losses.items())}, {speed:.0f} tokens/s"
        return {**losses, "lr": rate, "grad_norm": norm, "tokens": progress.tokens, "tokens_per_second": speed}

    def _summed(
        self, batches: Sequence[tuple[list[int], dict[str, Tensor]]], labels: float
    ) -> dict[str, Tensor] | None:
        """Losses summed over the micro-batches of a step; None if it must be begun again with smaller ones.

        Raises: torch.OutOfMemoryError if they are of one row already, or other processes would have to go along.
        """
        sums: dict[str, Tensor] = {}
        try:
            for parts in self._passes(batches, labels):
                for name, part in parts.items():
                    sums[name] = sums.get(name, 0.0) + part.detach().double()
            return sums
        except torch.OutOfMemoryError:
            if max(len(rows) for rows, _ in batches) == 1 or self.sharding.ranks.size > 1:
                raise
        self.gradients.clear_()
        self.halving.halve_(max(len(rows) for rows, _ in batches))
        return None

    def _passes(
        self, batches: Sequence[tuple[list[int], dict[str, Tensor]]], labels: float
    ) -> Iterator[dict[str, Tensor]]:
        """Forward and backward of each micro-batch, whose losses are given; gradients go where they are summed."""
        apart = self.accelerator.device.type == "cpu" and self.sharding.name == "replicated"
        if apart and can_run_apart(self.guide, self.gradients, batches):
            yield from run_apart(self.student, self.guide, self.gradients, batches, labels)
            return
        for rows, batch in batches:
            loss, parts = self.guide.loss(self.student, self._on_device(batch), labels, rows)
            self.accelerator.backward(loss * self.sharding.loss_scale)
            yield {"loss": loss, **parts}

    def _micro_batches(self, step: int, order: Order) -> list[list[int]]:
        """Rows of each micro-batch of a step that is this process's, who takes every so many-th of the step's rows."""
        count, ranks = self.config.windows_per_step, self.sharding.ranks
        size = self.halving.most or self.config.micro_batch
        mine = order.indices(step * count, count, ranks.rank, ranks.size)
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def _finite(
        self, step: int, sums: Mapping[str, Tensor], batches: Sequence[tuple[list[int], dict[str, Tensor]]]
    ) -> dict[str, float]:
        """Losses over all processes. Raises TrainingError naming what is not finite, and where it began."""
        names = sorted(sums)
        total = self.sharding.total(torch.stack([sums[name] for name in names])).tolist()
        losses = dict(zip(names, total, strict=True))
        if broken := [name for name, value in losses.items() if not math.isfinite(value)]:
            parts = [name for name in broken if name != "loss"] or broken
            raise TrainingError(
                f"step {step + 1} of {self.config.steps}: {', '.join(parts)} is {losses[parts[0]]}"
                f"{said_of(self._where(batches))}; lower lr, or compute with --dtype float32{self._kept()}"
            )
        return losses

    def _where(self, batches: Sequence[tuple[list[int], dict[str, Tensor]]]) -> str | None:
        """The module of the student in which numbers stop being finite, of these batches; None if in none."""
        if self.sharding.ranks.size > 1:  # a forward takes all processes, and not all need have a reason for one
            return None

        def forward() -> None:
            for rows, batch in batches:
                self.guide.loss(self.student, self._on_device(batch), 1.0, rows)

        return first_not_finite(self.student, forward)

    def _refresh_(self, step: int) -> dict[str, float]:
        """Choose masks anew, and write the parameters with them; what they came to."""
        counts = self.masking.refresh_(self.optimizer.effective, step)
        self.optimizer.write_()
        return self.sharding.sum_over_shards(counts).metrics()

    def _measure(self, progress: Progress, metrics: Metrics) -> float:
        """Mean cross entropy on the held-out windows; keeps the weights if it is the lowest after a step.

        Raises: TrainingError if it is not finite, or has risen too far over its lowest.
        """
        trained = nll = self.held_out.student_nll(self.student)
        if not self.masking.exact:  # what is trained is no worse for what a mask will make of it
            with self.optimizer.as_result():
                nll = self.held_out.student_nll(self.student)
        progress.held_out = nll
        metrics.write(step=progress.step, held_out_nll=nll, held_out_perplexity=math.exp(min(nll, 700.0)))
        settled = self.masking.settled(progress.step)
        if not trained <= (progress.lowest + self.config.diverged if settled else math.inf):
            raise TrainingError(
                f"step {progress.step} of {self.config.steps}: the held-out loss is {trained:.3f} where it was "
                f"{progress.lowest:.3f}: training diverged; lower lr{self._kept()}"
            )
        if settled:  # until then more and more is taken away, and a higher loss says nothing
            progress.lowest = min(progress.lowest, trained)
        if progress.step and settled and nll < progress.best.get("nll", math.inf):
            last = progress.step == self.config.steps
            name = None if last else self.checkpoints.save_best(progress.step)
            progress.best = {"nll": nll, "step": progress.step, "name": name}
        return nll

    def _kept(self) -> str:
        saved = self.checkpoints.facts.get("step")
        return f"; the checkpoint of step {saved} is kept in {self.run.folder}" if saved else ""
