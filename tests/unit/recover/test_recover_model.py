"""Whole trainings of tiny models: what is held, what is refused, how a killed one goes on, and several processes."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.errors import CompressError, FormatError, RecipeError, RunError, TrainingError
from compressllm.core.launch import launched_ranks
from compressllm.core.pattern import NM
from compressllm.core.run import JOURNAL, Run
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.checkpoint import MASKS_NAME
from compressllm.recover import loop, passes
from compressllm.recover.config import RecoverConfig
from compressllm.recover.metrics import read_metrics
from compressllm.recover.model import recover_model

LR = 2e-3


@pytest.fixture
def ids(tmp_path: Path) -> str:
    """(24, 16) token ids as a file."""
    path = tmp_path / "ids.npy"
    np.save(path, torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(5)).numpy())
    return str(path)


@pytest.fixture
def dense(llama: PreTrainedModel, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def settings(dense: Path, ids: str) -> Callable[..., RecoverConfig]:
    """Settings of a training of 8 steps, four windows each; ``evaluate_every`` 0.25 makes four checkpoints.

    In float32, on machines too that would train in bfloat16: what is compared is closer than that.
    """

    def make(**changes: Any) -> RecoverConfig:
        base = {
            "teacher": str(dense), "data": (ids,), "seqlen": 16, "held_out": 0.2, "max_tokens": 8 * 64,
            "batch_tokens": 64, "micro_batch": 2, "lr": LR, "warmup": 0.2, "refresh": 2, "evaluate_every": 0.25,
            "save_every": 0.25, "dtype": "float32",
        }  # fmt: skip
        return RecoverConfig(**{**base, **changes})

    return make


@pytest.fixture
def student(member: Callable[..., Path], llama: PreTrainedModel) -> Path:
    return member("student", llama, 1)


def recovered(student: Path, config: RecoverConfig, folder: Path) -> tuple[Bundle, Run]:
    folder.mkdir(exist_ok=True)
    run = Run(seed=3, folder=folder)
    return recover_model(open_bundle(str(student)), config, run), run


def weights(bundle: Bundle) -> dict[str, Tensor]:
    assert bundle.checkpoint
    return {name: bundle.checkpoint.read(name) for name in sorted(bundle.checkpoint.specs)}


def farthest(one: Bundle, other: Bundle) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("masking", ["fixed", "ast", "deferred"])
def test_what_comes_out_obeys_mask_and_pattern(masking: str, student: Path, settings, tmp_path: Path) -> None:
    before = open_bundle(str(student))
    after, run = recovered(student, settings(masking=masking), tmp_path / "out")
    assert (tmp_path / "out" / "model" / MASKS_NAME).exists()
    assert after.patterns == before.patterns
    same = after.masks.sha256() == before.masks.sha256()
    assert same == (masking == "fixed"), "masks move, and only where they may"
    for name in after.masks:
        weight, keep = weights(after)[f"{name}.weight"], after.masks[name]
        assert NM(2, 4).violations(weight != 0) == 0
        assert not (weight[~keep] != 0).any()
        assert not torch.signbit(weight[~keep]).any()
    assert farthest(before, after) > 0
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "held_out_nll" in row] == [0, 2, 4, 6, 8]
    refreshed = [row["step"] for row in rows if "flip_rate" in row]
    assert refreshed == ([] if masking == "fixed" else [2, 4, 6]), "the last tenth is frozen"
    assert run.metrics["tokens"] == 8 * 64
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "model", JOURNAL]


@pytest.mark.parametrize("masking", ["gradual", "mask-decay", "structure-decay"])
def test_masks_that_tighten_end_at_the_pattern(masking: str, dense: Path, student: Path, settings, tmp_path) -> None:
    config = settings(masking=masking, pattern="2:4", freeze=0.25)
    after, run = recovered(dense, config, tmp_path / "out")
    assert all(NM(2, 4).violations(weights(after)[f"{name}.weight"] != 0) == 0 for name in after.masks)
    assert run.metrics["sparsity"] == 0.5
    assert run.metrics["best_step"] >= (1 if masking == "mask-decay" else 4), "only what obeys the pattern counts"
    with pytest.raises(RecipeError, match=rf"masking {masking}: begins with a dense model .* pruned already"):
        recovered(student, settings(masking=masking, pattern="2:4"), tmp_path / "refused")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"pattern": "0.5"}, CompressError, "0.5/layer has no groups; give a pattern as 2:4"),
        ({"pattern": "2:4", "structure": "geometric", "skip": ["*.down_proj"]}, None, ""),
        ({"pattern": "2:4", "structure": "geometric"}, CompressError, "48 inputs are not a multiple of 32"),
    ],
)
def test_structure_decay_needs_groups_that_fit(
    changes: dict, error: type | None, said: str, dense: Path, settings, tmp_path: Path
) -> None:
    config = settings(masking="structure-decay", **changes)
    if error is None:
        recovered(dense, config, tmp_path / "out")
        return
    with pytest.raises(error, match=said):
        recovered(dense, config, tmp_path / "out")


def test_refresh_counts_steps_not_forwards(student: Path, settings, tmp_path: Path) -> None:
    """Under activation checkpointing each block's forward runs twice; the same masks come out, bit for bit."""
    plain, _ = recovered(student, settings(masking="ast"), tmp_path / "plain")
    again, _ = recovered(student, settings(masking="ast", activation_checkpointing=True), tmp_path / "again")
    assert farthest(plain, again) == 0


def test_a_dense_student_is_masked_by_size(dense: Path, settings, tmp_path: Path) -> None:
    after, run = recovered(dense, settings(masking="ast", pattern="2:4", skip=["*.o_proj"]), tmp_path / "out")
    assert run.metrics["masks_from"] == "magnitude"
    assert 0 < len(after.masks) == sum(not name.endswith("o_proj") for name in all_linears(after.model))
    assert all(NM(2, 4).violations(after.masks[name]) == 0 for name in after.masks)


def test_zeros_are_held_where_masks_are_missing(student: Path, settings, tmp_path: Path) -> None:
    kept = open_bundle(str(student)).masks.sha256()
    (student / MASKS_NAME).unlink()
    (student / "compressllm.json").unlink()
    after, run = recovered(student, settings(), tmp_path / "out")
    assert "by their zeros" in run.warnings[0]
    assert after.masks.sha256() == kept
    assert set(map(str, after.patterns.values())) == {"2:4"}


@pytest.mark.parametrize("adapter", ["bias-norm", "masklora", "spp"])
def test_adapters_leave_the_zeros_where_they_are(adapter: str, student: Path, settings, tmp_path: Path) -> None:
    before = open_bundle(str(student))
    options = {adapter: {"rank": 4}} if adapter != "bias-norm" else adapter
    after, _ = recovered(student, settings(train=options), tmp_path / "out")
    assert after.masks.sha256() == before.masks.sha256()
    changed = {name for name, value in weights(after).items() if not torch.equal(value, weights(before)[name])}
    linears = {name for name in changed if name.removesuffix(".weight") in after.masks}
    assert bool(linears) == (adapter != "bias-norm")
    assert any("norm" in name for name in changed)
    assert not any("embed" in name or "lm_head" in name for name in changed)


def test_frozen_parameters_stay_as_they_are(student: Path, settings, tmp_path: Path) -> None:
    before = weights(open_bundle(str(student)))
    after, run = recovered(student, settings(frozen=["*embed_tokens*", "*lm_head*"]), tmp_path / "out")
    unchanged = {name for name, value in weights(after).items() if torch.equal(value, before[name])}
    assert unchanged == {name for name in before if "embed_tokens" in name or "lm_head" in name}
    assert unchanged
    assert run.metrics["trained_parameters"] == sum(v.numel() for n, v in before.items() if n not in unchanged)
    with pytest.raises(RecipeError, match=r"frozen: '\*emb' matches no parameter; names look like model\.embed"):
        recovered(student, settings(frozen=["*emb"]), tmp_path / "none")
    with pytest.raises(RecipeError, match="frozen: all parameters are"):
        recovered(student, settings(frozen=["*"]), tmp_path / "all")
    with pytest.raises(RecipeError, match="q_proj is under a mask that moves"):
        recovered(student, settings(frozen=["*q_proj*"], masking="ast"), tmp_path / "moving")


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_trained_with_it(
    member: Callable[..., Path], build_model: Any, settings, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    teacher = other(build_model, tmp_path / "tied", tie_word_embeddings=True)
    student = member("tied-student", open_bundle(teacher).live(), 1)
    tensors = load_file(student / "model.safetensors")
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "unused": torch.arange(3.0)}
    save_file(tensors | extra, student / "model.safetensors", {"format": "pt"})
    after, _ = recovered(student, settings(teacher=teacher), tmp_path / "out")
    written = weights(after)
    assert not torch.equal(written["lm_head.weight"], extra["lm_head.weight"])
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert torch.equal(written["unused"], extra["unused"])


def test_branches_are_left_out_of_the_result(student: Path, settings, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a branch is dense, and no checkpoint"):
        recovered(student, settings(slorb={"block": 8}), tmp_path / "refused")
    after, run = recovered(student, settings(slorb={"block": 8, "export": "drop"}), tmp_path / "out")
    assert run.metrics["slorb"]["branch_to_weight_norm"] > 0
    assert weights(after).keys() == weights(open_bundle(str(student))).keys()
    assert all(NM(2, 4).violations(weights(after)[f"{name}.weight"] != 0) == 0 for name in after.masks)

    merged, run = recovered(student, settings(slorb={"block": 8, "export": "merge"}), tmp_path / "merged")
    assert not merged.masks
    rows = read_metrics(tmp_path / "merged" / "metrics.jsonl")
    best = min(row["held_out_nll"] for row in rows if "held_out_nll" in row and row["step"])
    assert "linears are dense from now on" in run.warnings[-1]
    assert run.metrics["held_out_perplexity"]["after"] == pytest.approx(math.exp(best), rel=1e-5)
    for name in after.masks:
        assert weights(merged)[f"{name}.weight"].count_nonzero() > 0.9 * weights(merged)[f"{name}.weight"].numel()
    assert farthest(merged, open_bundle(str(tmp_path / "merged" / "model"))) == 0


def test_kept_weights_follow_the_data_order_of_the_seed(student: Path, settings, tmp_path: Path) -> None:
    one, _ = recovered(student, settings(), tmp_path / "one")
    same, _ = recovered(student, settings(), tmp_path / "same")
    assert farthest(one, same) == 0
    run = Run(seed=4, folder=tmp_path)
    assert farthest(one, recover_model(open_bundle(str(student)), settings(), run)) > 0


@pytest.mark.parametrize("masking", ["fixed", "ast", "deferred"])
@pytest.mark.parametrize("at", [3, 7])
def test_killed_training_goes_on_to_the_same_bits(
    masking: str, at: int, student: Path, settings, tmp_path: Path
) -> None:
    config = settings(masking=masking)
    straight, _ = recovered(student, config, tmp_path / "straight")

    def killed() -> None:
        torch.set_num_threads(1)
        step = loop.Training._step

        def dies(self: loop.Training, number: int, *rest: Any) -> Any:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, number, *rest)

        loop.Training._step = dies  # type: ignore[method-assign]
        recovered(student, config, tmp_path / "killed")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    journal = json.loads((tmp_path / "killed" / JOURNAL).read_text())
    assert journal["step"] == at - at % 2
    assert not (tmp_path / "killed" / "model").exists()
    resumed, run = recovered(student, config, tmp_path / "killed")
    assert farthest(straight, resumed) == 0
    assert straight.masks.sha256() == resumed.masks.sha256()
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed")]
    for one, other in zip(*rows, strict=True):
        for key in one.keys() - {"tokens_per_second"}:
            assert one[key] == other[key], (one["step"], key)
    assert run.metrics["tokens"] == 8 * 64


def interrupted(student: Path, config: RecoverConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.Training._step

    def stops(self: loop.Training, number: int, *rest: Any) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            recovered(student, config, folder)


def test_state_survives_a_round_trip_through_everything_it_could_be_confused_with(
    student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss curve could hide a moment that was not restored; so all of it is spoiled, and compared bit for bit."""
    seen: list[dict[str, Tensor]] = []

    def snapshot(training: loop.Training) -> dict[str, Tensor]:
        optimizer, masks = training.optimizer, training.masking.weights
        parts = {"w": optimizer.weights, "mu": optimizer.first, "nu": optimizer.second}
        state = {f"{part}.{name}": value.clone() for part, held in parts.items() for name, value in held.items()}
        state |= {f"keep.{name}": one.keep.clone() for name, one in masks.items()}
        state |= {f"p.{name}": value.clone() for name, value in optimizer._parameters.items()}
        return state | {"steps": torch.tensor(optimizer.steps)}

    step = loop.Training._step

    def spoils(self: loop.Training, number: int, *rest: Any) -> Any:
        if number == 4 and not seen:  # after the checkpoint of step 4
            seen.append(snapshot(self))
            for name, weight in self.optimizer.weights.items():
                weight.add_(1)
                self.optimizer.first[name].add_(7)
                self.optimizer.second[name].add_(7)
            for one in self.masking.weights.values():
                one.keep = ~one.keep
            self.optimizer.steps += 5
            assert self.checkpoints.resume_() == 4
            seen.append(snapshot(self))
        return step(self, number, *rest)

    monkeypatch.setattr(loop.Training, "_step", spoils)
    recovered(student, settings(masking="ast"), tmp_path / "out")
    before, after = seen
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_resuming_with_other_settings_names_every_one_of_them(
    student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(student, settings(), tmp_path / "out", monkeypatch)
    with pytest.raises(
        RunError, match=r"settings\.lr: 0.002 then, 0.5 now; settings\.betas\.1: 0.95 then, 0.5 now"
    ) as told:
        recovered(student, settings(lr=0.5, betas=(0.9, 0.5)), tmp_path / "out")
    assert "\n" not in str(told.value)


def test_a_damaged_checkpoint_is_refused(
    student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.models.tensorfile import TensorFile

    interrupted(student, settings(), tmp_path / "out", monkeypatch)
    read = TensorFile.read
    monkeypatch.setattr(
        TensorFile, "read", lambda self, name: read(self, name) * (0 if name.endswith(".second") else 1)
    )
    with pytest.raises(FormatError, match="second moments are zero"):
        recovered(student, settings(), tmp_path / "out")


def test_loss_that_is_not_finite_ends_training_and_leaves_the_checkpoint(
    student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.recover.guide import Guide

    loss, calls = Guide.loss, [0]

    def broken(self: Guide, *rest: Any) -> Any:
        calls[0] += 1
        total, parts = loss(self, *rest)
        return (total * float("nan"), parts | {"kl": parts["kl"] * float("nan")}) if calls[0] > 10 else (total, parts)

    monkeypatch.setattr(Guide, "loss", broken)
    with pytest.raises(TrainingError, match=r"step 6 of 8: kl is nan; lower lr.* the checkpoint of step 4 is kept"):
        recovered(student, settings(), tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-0000004" / "state.safetensors").exists()
    assert not (tmp_path / "out" / "model").exists()


def test_loss_that_is_not_finite_is_traced_to_a_module(
    student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.recover.student import Student

    forward, calls = Student.forward, [0]

    def overflowing(self: Student, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == 10:
            self.model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
        return forward(self, *rest)

    monkeypatch.setattr(Student, "forward", overflowing)
    with pytest.raises(TrainingError, match=r"kl is nan, first in the output of .*layers\.1\.mlp\.up_proj; "):
        recovered(student, settings(), tmp_path / "out")


def test_a_step_that_runs_out_of_memory_is_done_again_in_smaller_batches(
    student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.recover.guide import Guide

    loss, asked = Guide.loss, []

    def scarce(self: Guide, *rest: Any) -> Any:
        made = loss(self, *rest)
        asked.append(len(rest[1]["input_ids"]))
        if asked[-1] > 1 and len(asked) > 5:
            made[0].backward()  # what was summed before memory ran out must not be counted
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made

    monkeypatch.setattr(Guide, "loss", scarce)
    halved, run = recovered(student, settings(), tmp_path / "halved")
    assert {2, 1} <= set(asked)
    assert run.warnings[1:] == ["out of memory with 2 windows at once; going on with 1"]
    monkeypatch.setattr(Guide, "loss", loss)
    expected, _ = recovered(student, settings(), tmp_path / "whole")
    assert farthest(halved, expected) < 1e-5


def test_divergence_ends_training(student: Path, settings, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the held-out loss is .* training diverged; lower lr"):
        recovered(student, settings(lr=30.0, clip=None, diverged=1.0), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_the_best_weights_are_published_not_the_last(
    student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.recover.heldout import HeldOut

    told = iter([4.0, 3.5, 3.0, 3.2, 3.3])
    monkeypatch.setattr(HeldOut, "student_nll", lambda self, student: next(told))
    best: list[dict[str, Tensor]] = []
    measure = loop.Training._measure

    def keeps(self: loop.Training, progress: Any, metrics: Any) -> Any:
        if progress.step == 4:
            best.append({name: self.optimizer.result(name).clone() for name in self.optimizer.weights})
        return measure(self, progress, metrics)

    monkeypatch.setattr(loop.Training, "_measure", keeps)
    after, run = recovered(student, settings(masking="ast"), tmp_path / "out")
    assert run.metrics["best_step"] == 4
    for name, value in best[0].items():
        assert torch.equal(weights(after)[name], value)
    assert not list((tmp_path / "out").glob("best-*"))


def other(build_model: Any, folder: Path, **changes: Any) -> str:
    """A dense model unlike the student, as a folder."""
    from transformers import LlamaConfig

    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    build_model(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("shape", "losses", "said"),
    [
        ({"vocab_size": 65}, "kl=1.0", "65 token embeddings, the student 64"),
        ({"num_hidden_layers": 2}, "squarehead=1.0", "the student has 3 blocks, the teacher 2"),
        ({"hidden_size": 40, "head_dim": 8}, "kl=1.0,squarehead=1.0", "the student is 32 wide, the teacher 40"),
    ],
)
def test_an_unfitting_teacher_is_refused(
    shape: dict[str, int], losses: str, said: str, student: Path, settings, tmp_path: Path, build_model
) -> None:
    teacher = other(build_model, tmp_path / "other", **shape)
    with pytest.raises(RecipeError, match=said) as told:
        recovered(student, settings(teacher=teacher, losses=losses), tmp_path / "out")
    assert "\n" not in str(told.value)


def test_a_dense_model_learns_the_text_to_be_a_teacher(dense: Path, student: Path, settings, tmp_path: Path) -> None:
    config = settings(masking="none", losses="ce=1.0", teacher=None)
    taught, run = recovered(dense, config, tmp_path / "teacher")
    assert not taught.masks
    assert not (tmp_path / "teacher" / "model" / MASKS_NAME).exists()
    assert run.metrics["sparsity"] == 0
    before, after = (weights(one)["model.layers.0.mlp.up_proj.weight"] for one in (open_bundle(str(dense)), taught))
    assert (before != after).float().mean() > 0.99, "all of it is trained"
    recovered(student, settings(teacher=str(tmp_path / "teacher" / "model")), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"masking none: .*is pruned, and would be filled again; take masking fixed"):
        recovered(student, config, tmp_path / "refused")


def test_masks_of_another_model_are_refused(student: Path, member, llama, settings, tmp_path: Path) -> None:
    for parameter in llama.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    strange = member("strange", llama, 2)
    shutil.copyfile(strange / MASKS_NAME, student / MASKS_NAME)
    with pytest.raises(FormatError, match="are not zero where its mask says pruned"):
        recovered(student, settings(), tmp_path / "out")


def test_a_dense_student_has_nothing_to_hold(dense: Path, settings, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is dense: it has no masks and no zeros to hold; prune it first"):
        recovered(dense, settings(), tmp_path / "out")
    with pytest.raises(RecipeError, match="give the pattern it is to be trained to"):
        recovered(dense, settings(masking="ast"), tmp_path / "out")


def test_another_pattern_than_the_students_is_refused(student: Path, settings, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"breaks 1:4 in .* places; give the pattern it was pruned to"):
        recovered(student, settings(pattern="1:4"), tmp_path / "out")


@pytest.mark.parametrize("sharding", ["replicated", "fsdp2"])
@pytest.mark.parametrize("masking", ["fixed", "ast"])
def test_two_processes_come_to_what_one_does(
    sharding: str, masking: str, student: Path, settings, tmp_path: Path, launch
) -> None:
    alone, _ = recovered(student, settings(masking=masking), tmp_path / "alone")

    def work(rank: int) -> Any:
        with launched_ranks() as ranks:
            (tmp_path / "shared").mkdir(exist_ok=True)
            run = Run(seed=3, folder=tmp_path / "shared", ranks=ranks)
            recover_model(open_bundle(str(student)), settings(masking=masking, sharding=sharding), run)
            return run.metrics["masks_sha256"]

    hashes = launch(work)
    together = open_bundle(str(tmp_path / "shared" / "model"))
    assert hashes == [alone.masks.sha256()] * 2
    assert farthest(alone, together) < LR * 1e-2, "gradients are sums over all windows, whoever took them"


def test_shards_of_two_processes_are_taken_up_by_one(
    student: Path, settings, tmp_path: Path, launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _ = recovered(student, settings(masking="ast"), tmp_path / "straight")

    def work(rank: int) -> Any:
        with launched_ranks() as ranks:
            (tmp_path / "shards").mkdir(exist_ok=True)
            run = Run(seed=3, folder=tmp_path / "shards", ranks=ranks)
            step = loop.Training._step

            def fails(self: loop.Training, number: int, *rest: Any) -> Any:
                if number == 5:
                    raise CompressError("enough")
                return step(self, number, *rest)

            loop.Training._step = fails  # type: ignore[method-assign]
            recover_model(open_bundle(str(student)), settings(masking="ast", sharding="fsdp2"), run)

    assert all(isinstance(error, CompressError) for error in launch(work))
    journal = json.loads((tmp_path / "shards" / JOURNAL).read_text())
    journal["fingerprint"]["settings"]["sharding"] = "replicated"
    (tmp_path / "shards" / JOURNAL).write_text(json.dumps(journal))
    resumed, _ = recovered(student, settings(masking="ast"), tmp_path / "shards")
    assert farthest(straight, resumed) < LR * 1e-2
    assert straight.masks.sha256() == resumed.masks.sha256()


@pytest.mark.parametrize(("dtype", "units"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_micro_batches_on_several_cores_come_to_the_same(
    dtype: str, units: bool, student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressllm.recover.head.multiplies_bf16_faster", lambda device: units)
    one, _ = recovered(student, settings(dtype=dtype), tmp_path / "one")
    apart: list[str] = []
    work = passes.map_batches
    monkeypatch.setattr(
        passes, "map_batches", lambda f, *rest, **named: apart.append(f.__name__) or work(f, *rest, **named)
    )
    try:
        torch.set_num_threads(2)
        two, _ = recovered(student, settings(dtype=dtype), tmp_path / "two")
    finally:
        torch.set_num_threads(1)
    assert apart
    assert ("at_head" not in apart) is units  # products there are then rounded by a setting of the whole process
    assert farthest(one, two) <= (LR * 1e-2 if units else 0)
    assert getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none") == "none"


@pytest.mark.parametrize("masking", ["fixed", "ast"])
def test_a_model_in_memory_is_trained_in_place(masking: str, student: Path, settings, tmp_path: Path) -> None:
    stored, _ = recovered(student, settings(masking=masking), tmp_path / "stored")
    opened = open_bundle(str(student))
    live = Bundle(opened.live(), None, opened.masks, opened.patterns)
    after = recover_model(live, settings(masking=masking), Run(seed=3))
    assert after.model is live.model
    assert after.masks.sha256() == stored.masks.sha256()
    own = dict(after.model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in weights(stored).items())
    assert not any(parameter.requires_grad for parameter in own.values())


@pytest.mark.parametrize(("faster", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_trains_in_bfloat16_where_that_is_faster(
    faster: bool, dtype: str, student: Path, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressllm.core.compute.multiplies_bf16_faster", lambda device: faster)
    _, run = recovered(student, settings(dtype="auto", max_tokens=64), tmp_path / "out")
    assert run.metrics["dtype"] == dtype
