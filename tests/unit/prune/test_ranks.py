"""Pruning on several ranks, against one process."""

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.walker import WalkOptions, walk_blocks
from compressllm.core.errors import CalibrationError, RankError, RunError
from compressllm.core.launch import launched_ranks
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.shards import file_sha256
from compressllm.models.weights import LiveWeights
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.prune.wanda import Wanda

Launch = Callable[..., list[Any]]
EVERY = frozenset({"mean", "var", "sqnorm", "hessian"})
FILES = ("model.safetensors", "masks.safetensors", "compressllm.json", "config.json")


def settings(ids: str, method: Any = "wanda", pattern: str = "2:4", **more: Any) -> PruneConfig:
    calibration = {"source": ids}
    return PruneConfig(**{"method": method, "pattern": pattern, "calibration": calibration, "dtype": "float32"} | more)


def prune_folder(folder: Path, config: PruneConfig, into: Path, **run: Any) -> tuple[Bundle, Run]:
    into.mkdir(exist_ok=True)
    made = Run(folder=into, **run)
    return prune_model(open_bundle(str(folder)), config, made), made


def hashes(into: Path) -> list[str]:
    return [file_sha256(into / "model" / name) for name in FILES]


def differing(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Fraction of all mask bits that differ."""
    assert some.keys() == others.keys()
    assert some
    return sum(int((some[n] != others[n]).sum()) for n in some) / sum(keep.numel() for keep in some.values())


def masks_of(bundle: Bundle) -> dict[str, Tensor]:
    return {name: bundle.masks[name] for name in bundle.masks}


def test_statistics_are_those_of_one_process_and_the_same_on_every_rank(
    decoder: PreTrainedModel, windows: Tensor, launch: Launch
) -> None:
    def statistics(share: Tensor, options: WalkOptions) -> list[dict[str, Any]]:
        blocks = walk_blocks(decoder, share, LiveWeights(decoder), options)
        return [
            {name: (id(s), s.tokens, {k: s.need(k) for k in EVERY}) for name, s in b.collect(EVERY).items()}
            for b in blocks
        ]

    def work(rank: int) -> list[dict[str, Any]]:
        with launched_ranks() as ranks:
            share = ranks.share(windows)
            assert len(share) < len(windows)
            return statistics(share, WalkOptions(batch_tokens=32, ranks=ranks))

    alone = statistics(windows, WalkOptions(batch_tokens=32))
    results = launch(work, 3)
    for blocks in results:
        assert len(blocks) == len(alone) == 3
        for here, first, there in zip(blocks, results[0], alone, strict=True):
            assert here.keys() == there.keys()
            for name, (_, tokens, stats) in here.items():
                assert tokens == there[name][1]
                assert ".experts." in name or tokens == windows.numel()
                for stat, value in stats.items():
                    exact = there[name][2][stat]
                    torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
                    assert torch.equal(value, first[name][2][stat])
            groups, expected = ([[one[n][0] == one[m][0] for m in one] for n in one] for one in (here, there))
            assert groups == expected  # the same linears share their statistics


@pytest.mark.parametrize("method", PRUNERS.names())
def test_two_ranks_prune_as_one_process_does(
    llama: PreTrainedModel, folder: Path, ids: str, tmp_path: Path, launch: Launch, method: str
) -> None:
    config = settings(ids, method, skip=("*.1.self_attn.k_proj",))

    def work(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[Any], list[Any], Any]:
        with launched_ranks() as ranks:
            run = Run(ranks=ranks)
            model = copy.deepcopy(llama)
            live = prune_model(Bundle(model), config, run)
            streamed, streamed_run = prune_folder(folder, config, tmp_path / "shared", ranks=ranks)
            assert streamed.masks.sha256() == live.masks.sha256()
            assert streamed_run.records == run.records
            assert streamed_run.metrics == run.metrics
            weights = dict(model.state_dict())
            return masks_of(live), weights, dict(streamed.live().state_dict()), run.records, run.warnings, run.metrics

    first, second = launch(work)
    alone, alone_run = prune_folder(folder, config, tmp_path / "alone")
    for masks, weights, stored, records, warnings, metrics in (first, second):
        assert differing(masks, masks_of(alone)) < 1e-3
        assert differing(masks, first[0]) == 0.0
        assert weights.keys() == first[1].keys() == stored.keys()
        assert all(torch.equal(tensor, first[1][name]) for name, tensor in weights.items())
        assert all(torch.equal(tensor, first[1][name]) for name, tensor in stored.items())
        assert all(not weights[f"{name}.weight"][~keep].any() for name, keep in masks.items())
        assert [row["linear"] for row in records] == [row["linear"] for row in alone_run.records]
        assert [row["tokens"] for row in records] == [row["tokens"] for row in alone_run.records]
        assert [row["error"] for row in records] == pytest.approx([row["error"] for row in alone_run.records], rel=0.01)
        assert records == first[3]
        assert warnings == first[4]
        assert metrics["processes"] == 2
    assert alone_run.metrics["processes"] == 1
    if not PRUNERS.get(method)().needs:
        assert hashes(tmp_path / "shared") == hashes(tmp_path / "alone")


def test_every_linear_is_pruned_by_one_rank_only(
    llama: PreTrainedModel, ids: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[tuple[int, ...]] = []
    prune = Wanda.prune

    def counted(self: Wanda, weight: Tensor, *rest: Any) -> Pruned:
        solved.append(tuple(weight.shape))
        return Pruned(**{**vars(prune(self, weight, *rest)), "fallback": "by hand", "notes": {"solver": len(solved)}})

    monkeypatch.setattr(Wanda, "prune", counted)

    def work(rank: int) -> tuple[list[tuple[int, ...]], Run]:
        with launched_ranks() as ranks:
            run = Run(ranks=ranks)
            prune_model(Bundle(llama), settings(ids), run)
            run.ranks, run.on_warning = None, None
            return solved, run

    (mine, run), (theirs, other) = launch(work)
    assert mine
    assert theirs
    assert len(mine) + len(theirs) == 21
    assert run.records == other.records
    assert sorted(row["solver"] for row in run.records) == sorted(
        [*range(1, 1 + len(mine)), *range(1, 1 + len(theirs))]
    )
    assert run.warnings == other.warnings == [f"{row['linear']}: by hand" for row in run.records]


def test_one_process_under_a_launcher_gives_the_same_bytes_as_without(
    folder: Path, ids: str, tmp_path: Path, launch: Launch
) -> None:
    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            prune_folder(folder, settings(ids), tmp_path / "launched", ranks=ranks)

    assert launch(work, 1) == [None]
    prune_folder(folder, settings(ids), tmp_path / "plain")
    assert hashes(tmp_path / "launched") == hashes(tmp_path / "plain")


def stop_after(blocks: int, how: Callable[[], None]) -> Callable[..., Any]:
    """A progress display that ends things once so many blocks are finished."""

    def show(items: Any, total: int, label: str) -> Any:
        for done, item in enumerate(items):
            if done == blocks:
                how()
            yield item

    return show


def kill_all(folder: Path, config: PruneConfig, into: Path, launch: Launch, blocks: int) -> None:
    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            prune_folder(folder, config, into, ranks=ranks, show=stop_after(blocks, lambda: os._exit(9)))

    assert launch(work) == [None, None]
    assert len(json.loads((into / "progress.json").read_text())["blocks"]) == blocks


def test_ranks_that_were_killed_resume_to_the_same_bytes(
    folder: Path, ids: str, tmp_path: Path, launch: Launch
) -> None:
    def work(rank: int, into: Path) -> tuple[list[Any], Any]:
        with launched_ranks() as ranks:
            _, run = prune_folder(folder, settings(ids), into, ranks=ranks)
            return run.records, run.metrics["resumed_at_block"]

    whole = launch(lambda rank: work(rank, tmp_path / "whole"))
    kill_all(folder, settings(ids), tmp_path / "killed", launch, 2)
    resumed = launch(lambda rank: work(rank, tmp_path / "killed"))
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert [at for _, at in resumed] == [2, 2]
    assert [rows for rows, _ in resumed] == [rows for rows, _ in whole]


def test_another_number_of_processes_does_not_resume(folder: Path, ids: str, tmp_path: Path, launch: Launch) -> None:
    kill_all(folder, settings(ids), tmp_path / "killed", launch, 1)
    with pytest.raises(RunError, match="was begun with another number of processes; restore it"):
        prune_folder(folder, settings(ids), tmp_path / "killed")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("where", ["prune", "forward", "close"])
def test_a_rank_that_fails_anywhere_stops_all(
    folder: Path, ids: str, tmp_path: Path, launch: Launch, failing: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = {
        "prune": "compressllm.prune.wanda.Wanda.score",
        "forward": "compressllm.calibration.inputs.Call.run",
        "close": "compressllm.models.record.bundle_of",
    }[where]

    def fail(*arguments: Any, **options: Any) -> None:
        raise CalibrationError("broken here")

    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            if rank == failing:
                monkeypatch.setattr(at, fail)
            prune_folder(folder, settings(ids), tmp_path / "out", ranks=ranks)

    errors = launch(work)
    assert isinstance(errors[failing], CalibrationError)
    assert isinstance(errors[1 - failing], RankError)
    assert re.fullmatch(rf"rank {failing}: (model\S+: )?broken here", str(errors[1 - failing]))


def test_ranks_with_other_text_are_refused(
    llama: PreTrainedModel, ids: str, tmp_path: Path, windows: Tensor, launch: Launch
) -> None:
    np.save(tmp_path / "other.npy", windows.flip(0).numpy())

    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            prune_model(Bundle(llama), settings(str(tmp_path / "other.npy") if rank else ids), Run(ranks=ranks))

    for error in launch(work):
        assert isinstance(error, RunError)
        assert "rank 0 and rank 1 differ in settings, calibration text" in str(error)


def test_more_ranks_than_windows_are_refused(
    llama: PreTrainedModel, tmp_path: Path, windows: Tensor, launch: Launch
) -> None:
    np.save(tmp_path / "few.npy", windows[:2].numpy())

    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            prune_model(Bundle(llama), settings(str(tmp_path / "few.npy")), Run(ranks=ranks))

    for error in launch(work, 3):
        assert isinstance(error, CalibrationError)
        assert "2 calibration windows are fewer than the 3 processes" in str(error)
