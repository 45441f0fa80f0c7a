"""Refiners that start from the masks of a pruned checkpoint."""

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from compressllm.core.errors import CompressError, FormatError, PatternError, RecipeError, RunError
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.core.protocols import Pruned
from compressllm.core.run import Run
from compressllm.core.stats import InputStats
from compressllm.export.writer import export_model
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.shards import file_sha256
from compressllm.models.survey import survey
from compressllm.prune.config import PruneConfig
from compressllm.prune.dsnot import DSnoT
from compressllm.prune.model import prune_model

REFINER = {"dsnot": {"threshold": 0.0}}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def dense(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """The tiny Llama as a float32 checkpoint."""
    llama.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def prune(ids: str, dense: Path, tmp_path: Path) -> Callable[..., tuple[Bundle, Run]]:
    """``prune("a", method="magnitude")``: prune the dense checkpoint into a new folder of that name."""

    def into(name: str, model: Path | Bundle = dense, show: Any = None, **settings: Any) -> tuple[Bundle, Run]:
        (tmp_path / name).mkdir(exist_ok=True)
        run = Run(folder=tmp_path / name, **({"show": show} if show else {}))
        bundle = model if isinstance(model, Bundle) else open_bundle(str(model))
        config = PruneConfig(**{"calibration": {"source": ids}, "dtype": "float32", "method": REFINER} | settings)
        return prune_model(bundle, config, run), run

    return into


@pytest.fixture
def refined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, SparsityPattern]]:
    """The weight, mask and pattern of every call of DSnoT from now on."""
    seen: list[tuple[Tensor, Tensor, SparsityPattern]] = []
    refine = DSnoT.refine

    def spy(self: DSnoT, weight: Tensor, keep: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        seen.append((weight.clone(), keep.clone(), pattern))
        return refine(self, weight, keep, stats, pattern)

    monkeypatch.setattr(DSnoT, "refine", spy)
    return seen


@pytest.mark.parametrize(("source", "pattern"), [("folder", "2:4"), ("packed", "0.6/layer"), ("run", "0.6/layer")])
def test_a_refiner_starts_from_the_checkpoints_masks_and_the_models_weights(
    prune: Callable, llama: PreTrainedModel, refined: list, tmp_path: Path, source: str, pattern: str
) -> None:
    first, _ = prune("a", method="magnitude", pattern=pattern)
    where = {"folder": tmp_path / "a" / "model", "packed": tmp_path / "packed", "run": tmp_path / "a"}[source]
    if source == "packed":
        export_model(Checkpoint(tmp_path / "a" / "model"), where, "packed")
    streamed, run = prune("b", masks=str(where), pattern="16:32")  # not a pattern of 48 columns, and not asked
    before = llama.state_dict()
    assert len(refined) == 21
    for name, (weight, keep, said) in zip(all_linears(llama), refined, strict=True):
        assert torch.equal(keep, first.masks[name])
        assert torch.equal(weight, before[f"{name}.weight"])
        assert said == first.patterns[name] == streamed.patterns[name]
    moved = sum(int((streamed.masks[name] ^ first.masks[name]).sum()) for name in first.masks)
    assert moved == 2 * sum(row["swaps"] for row in run.records) > 0
    for name in first.masks:
        assert torch.equal(streamed.masks[name].sum(1), first.masks[name].sum(1))
    assert all(row.sound for row in survey(Checkpoint(tmp_path / "b" / "model"))[1])

    live, live_run = prune("c", model=Bundle(copy.deepcopy(llama)), masks=str(where))
    assert live.masks.sha256() == streamed.masks.sha256()
    assert live_run.metrics["given_masks_sha256"] == run.metrics["given_masks_sha256"] is not None
    weights = streamed.live().state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in live.model.state_dict().items())


def test_what_is_dense_there_or_skipped_here_stays_dense(prune: Callable, llama: PreTrainedModel, ids: str) -> None:
    first, _ = prune("a", method="magnitude", pattern="4:8", skip=("*.o_proj",))
    second, _ = prune("b", masks=str(first.checkpoint.folder), skip=("*.0.*",))
    assert list(second.masks) == [n for n in all_linears(llama) if "o_proj" not in n and ".0." not in n]
    assert set(second.patterns.values()) == {NM(4, 8)}
    after, before = second.live().state_dict(), llama.state_dict()
    assert all(torch.equal(after[f"{n}.weight"], before[f"{n}.weight"]) for n in all_linears(llama) if "o_proj" in n)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row")], ids=str)
def test_without_stored_masks_zeros_say_what_is_pruned(
    prune: Callable, llama: PreTrainedModel, refined: list, tmp_path: Path, pattern: SparsityPattern
) -> None:
    plain = copy.deepcopy(llama)
    keeps = {}
    for name, linear in all_linears(plain).items():
        if "o_proj" not in name:
            keeps[name] = pattern.keep(linear.weight.detach().abs())
            linear.weight.data *= keeps[name]
        linear.weight.data[0, 5] = 0.0  # one zero more is no sparsity, and within a pattern no weight is lost to it
    plain.save_pretrained(tmp_path / "plain")
    bundle, _ = prune("out", masks=str(tmp_path / "plain"), pattern=str(pattern))
    assert list(bundle.masks) == list(keeps)
    for (_, keep, said), expected in zip(refined, keeps.values(), strict=True):
        assert said == pattern
        assert pattern.violations(keep) == 0
        assert torch.equal(keep[1:], expected[1:])
        if isinstance(pattern, NM):
            assert (keep.view(len(keep), -1, 4).sum(-1) == 2).all()
            assert torch.equal(keep[0, :4], expected[0, :4])
            assert torch.equal(keep[0, 8:], expected[0, 8:])
    assert {pattern} == set(bundle.patterns.values())


def test_recorded_patterns_without_masks_fall_back_on_zeros(prune: Callable, refined: list, tmp_path: Path) -> None:
    first, _ = prune("a", method="magnitude", pattern="4:8")
    (tmp_path / "a" / "model" / "masks.safetensors").unlink()
    prune("b", masks=str(tmp_path / "a"))
    assert {said for _, _, said in refined} == {NM(4, 8)}
    assert all(torch.equal(keep, first.masks[n]) for n, (_, keep, _) in zip(first.masks, refined, strict=True))


# --- interruption ---


class KilledError(Exception):
    """Stands for the end of the process."""


def stop_after(blocks: int) -> Callable[[Iterable[Any], int, str], Iterable[Any]]:
    def show(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
        for done, item in enumerate(items):
            if done == blocks:
                raise KilledError
            yield item

    return show


def test_a_stopped_call_resumes_to_the_same_bytes(prune: Callable, tmp_path: Path) -> None:
    prune("a", method="magnitude")
    settings = {"masks": str(tmp_path / "a")}
    _, whole = prune("whole", **settings)
    with pytest.raises(KilledError):
        prune("stopped", show=stop_after(2), **settings)
    _, run = prune("stopped", **settings)
    assert run.records == whole.records
    assert run.metrics["resumed_at_block"] == 2
    for name in ("model.safetensors", "masks.safetensors"):
        assert file_sha256(tmp_path / "stopped/model" / name) == file_sha256(tmp_path / "whole/model" / name)


def test_a_call_begun_with_other_masks_is_refused(prune: Callable, tmp_path: Path) -> None:
    prune("a", method="magnitude")
    prune("b", method="random")
    with pytest.raises(KilledError):
        prune("stopped", show=stop_after(1), masks=str(tmp_path / "a"))
    with pytest.raises(RunError, match="begun with another settings, masks;"):
        prune("stopped", masks=str(tmp_path / "b"))
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "a")  # under the same name
    with pytest.raises(RunError, match="begun with another masks;"):
        prune("stopped", masks=str(tmp_path / "a"))


# --- what is refused ---


def test_methods_that_choose_their_own_mask(prune: Callable, tmp_path: Path) -> None:
    prune("a", method="magnitude")
    with pytest.raises(RecipeError, match=r"^masks: wanda does not start from a given mask; use a refiner: .*dsnot"):
        prune("b", method="wanda", masks=str(tmp_path / "a"))


def test_checkpoints_without_a_sparse_linear(prune: Callable, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"^masks: .*dense: none of the linears to refine is sparse there"):
        prune("b", masks=str(dense))
    prune("a", method="magnitude", skip=("*.mlp.*",))
    with pytest.raises(FormatError, match="none of the linears to refine"):
        prune("c", masks=str(tmp_path / "a"), skip=("*.self_attn.*",))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"intermediate_size": 64}, r"has model\.layers\.0\.mlp\.gate_proj of shape \(64, 32\), and the model has"),
        ({"num_hidden_layers": 2}, r"has no model\.layers\.2\..*, and the model has model\.layers\.2"),
        ({"num_hidden_layers": 4}, r"has model\.layers\.3\..*, and the model has no model\.layers\.3"),
    ],
)
def test_another_models_checkpoint(
    prune: Callable, llama: PreTrainedModel, build_model: Callable, tmp_path: Path, change: dict, says: str
) -> None:
    other = {**llama.config.to_dict(), **change}
    build_model(LlamaConfig(**other)).save_pretrained(tmp_path / "other")
    with pytest.raises(FormatError, match=f"^masks: .*other: {says}") as caught:
        prune("b", masks=str(tmp_path / "other"))
    assert "\n" not in str(caught.value)


def test_masks_that_break_their_pattern(prune: Callable, llama: PreTrainedModel, tmp_path: Path) -> None:
    prune("a", method="magnitude", pattern="4:8")
    plain = open_bundle(str(tmp_path / "a")).live()
    plain.save_pretrained(tmp_path / "plain")  # which says nothing of its pattern
    with pytest.raises(PatternError, match=rf"^masks: .*plain: {Q}: its mask breaks 2:4 in \d+ places; give the pat"):
        prune("b", masks=str(tmp_path / "plain"))
    with pytest.raises(PatternError, match="48 inputs are not a multiple of 32"):
        prune("b", masks=str(tmp_path / "plain"), pattern="16:32", skip=("*.[qkvogu]*_proj",))
    facts = json.loads((tmp_path / "a/model/compressllm.json").read_text())
    facts["linears"][Q]["pattern"] = "1:4"
    (tmp_path / "a/model/compressllm.json").write_text(json.dumps(facts))
    with pytest.raises(FormatError, match=rf"^masks: .*model: {Q}: its mask breaks 1:4 in \d+ places, though"):
        prune("b", masks=str(tmp_path / "a"))


def test_a_model_that_is_sparse_itself(prune: Callable, tmp_path: Path) -> None:
    prune("a", method="magnitude")
    with pytest.raises(RecipeError, match=f"^masks: {Q} of the model is sparse already; give the dense model"):
        prune("b", model=tmp_path / "a", masks=str(tmp_path / "a"))


def test_masks_that_do_not_fit_their_weight(prune: Callable, tmp_path: Path) -> None:
    prune("a", method="magnitude")
    masks = load_file(tmp_path / "a/model/masks.safetensors")
    masks[Q] = masks[Q][1:].clone()
    save_file(masks, tmp_path / "a/model/masks.safetensors")
    with pytest.raises(CompressError, match=f"the mask of {Q} does not fit"):
        prune("b", masks=str(tmp_path / "a"))
