import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from compressllm.core.errors import FormatError, PatternError, RecipeError
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import ALLOCATORS, DenseLinear
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.core.stats import InputStats
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.shards import file_sha256
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.prune.owl import OWL, spread_around


@pytest.fixture
def wide(build_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A Llama whose blocks differ in outliers, with rows short enough for rounding to show in the total."""
    shape = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = build_model(LlamaConfig(vocab_size=64, pad_token_id=0, **shape))
    generator = torch.Generator().manual_seed(2)
    for index in range(4):
        weight = model.model.layers[index].mlp.up_proj.weight.data
        weight[torch.rand(weight.shape, generator=generator) < 0.01 * index] *= 20
    return model


def settings(ids: str, **more: Any) -> PruneConfig:
    return PruneConfig(**{"calibration": {"source": ids}, "dtype": "float32", "pattern": "0.6"} | more)


# --- OWL ---


def test_the_weighted_mean_is_the_target_and_the_range_twice_the_spread() -> None:
    outliers, weights = [0.01, 0.03, 0.02, 0.07], [100, 300, 200, 50]
    shares = spread_around(0.6, outliers, weights, 0.08)
    assert np.average(shares, weights=weights) == pytest.approx(0.6, abs=1e-12)
    assert max(shares) - min(shares) == pytest.approx(0.16, abs=1e-12)
    assert np.argsort(shares).tolist() == np.argsort(outliers)[::-1].tolist()
    straight = np.polyfit(outliers, shares, 1)
    assert np.allclose(np.polyval(straight, outliers), shares)


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.9, 0.97, 0.995, 1.0])
def test_the_mean_holds_where_sparsities_are_clipped(sparsity: float) -> None:
    weights = [100, 300, 200, 50]
    shares = spread_around(sparsity, [0.01, 0.03, 0.02, 0.07], weights, 0.2)
    assert np.average(shares, weights=weights) == pytest.approx(sparsity, abs=1e-9)
    assert min(shares) >= 0
    assert max(shares) <= max(0.99, sparsity)


def test_blocks_with_equal_outliers_get_the_same() -> None:
    assert spread_around(0.6, [0.02] * 3, [1, 2, 3], 0.08) == [0.6] * 3


def test_outliers_are_counted_over_the_whole_block() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 10, generator=generator), 3 * torch.randn(4, 10, generator=generator)]
    sqnorm = torch.rand(10, generator=generator)
    linears = {str(i): DenseLinear(lambda w=w: w, InputStats(1, sqnorm=sqnorm)) for i, w in enumerate(weights)}
    scores = [
        abs(w) * s**0.5
        for weight in weights
        for row in weight.tolist()
        for w, s in zip(row, sqnorm.tolist(), strict=True)
    ]
    expected = sum(score > 1.5 * sum(scores) / len(scores) for score in scores) / len(scores)
    assert 0 < expected < 1
    assert OWL(threshold=1.5).outlier_share(linears) == expected


@pytest.mark.parametrize("options", [{"threshold": 0}, {"threshold": float("inf")}, {"spread": -0.1}, {"spread": 0.6}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"allocator owl: {next(iter(options))}="):
        build(ALLOCATORS, {"owl": options})


# --- global magnitude ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.9, 1.0])
def test_the_global_threshold_is_that_of_one_sort(sparsity: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [
        {f"{i}.{j}": (0.1 + i) * torch.randn(9, 10 + j, generator=generator).to(dtype).float() for j in range(2)}
        for i in range(3)
    ]
    weights = {name: weight for block in blocks for name, weight in block.items()}

    def dense() -> Iterator[tuple[str, Mapping[str, DenseLinear]]]:
        for i, block in enumerate(blocks):
            yield str(i), {n: DenseLinear(lambda w=w: w, InputStats(0)) for n, w in block.items()}

    sizes = {name: weight.numel() for name, weight in weights.items()}
    made = build(ALLOCATORS, "global").allocate(dense, sizes, sparsity)
    every = sorted(abs(value) for weight in weights.values() for value in weight.flatten().tolist())
    remove = round(sparsity * len(every))
    counts = {name: made.sparsity[name] * size for name, size in sizes.items()}
    assert sum(counts.values()) == pytest.approx(remove, abs=1e-9)
    threshold = every[max(0, remove - 1)]
    for name, weight in weights.items():
        below, within = (weight.abs() < threshold).sum().item(), (weight.abs() <= threshold).sum().item()
        assert below - 1e-9 <= counts[name] <= within + 1e-9
    if remove:
        assert made.notes["magnitude_threshold"] == threshold


def test_global_magnitude_prunes_by_one_threshold(wide: PreTrainedModel) -> None:
    before = copy.deepcopy(wide)
    bundle = prune_model(Bundle(wide), PruneConfig(method="magnitude", pattern="0.6", allocation="global"))
    scores = {name: linear.weight.detach().abs() for name, linear in all_linears(before).items()}
    kept = torch.cat([scores[name][bundle.masks[name]] for name in scores])
    gone = torch.cat([scores[name][~bundle.masks[name]] for name in scores])
    assert gone.max() <= kept.min()
    assert bundle.masks.sparsity() == pytest.approx(0.6, abs=1e-5)


# --- through prune_model ---


@pytest.mark.parametrize("allocation", ALLOCATORS.names())
@pytest.mark.parametrize("pattern", ["0.333", "0.55", "0.6/row", "0.7/layer"])
def test_the_achieved_sparsity_is_the_one_asked_for(
    wide: PreTrainedModel, ids: str, allocation: str, pattern: str
) -> None:
    run = Run()
    bundle = prune_model(Bundle(wide), settings(ids, allocation=allocation, pattern=pattern), run)
    asked = float(pattern.split("/")[0])
    assert run.metrics["asked_sparsity"] == pytest.approx(asked, abs=1e-12)
    assert bundle.masks.sparsity() == pytest.approx(asked, abs=1e-4)
    assert not run.warnings
    zeros = sum(int((linear.weight == 0).sum()) for linear in all_linears(wide).values())
    assert zeros / sum(linear.weight.numel() for linear in all_linears(wide).values()) == pytest.approx(asked, abs=1e-4)
    for row in run.records:
        assert row["sparsity"] == pytest.approx(bundle.patterns[row["linear"]].sparsity, abs=1e-4)
    assert (len(set(bundle.patterns.values())) > 3) == (allocation != "uniform")


def test_a_model_too_small_for_the_target_warns_of_the_nearest(ids: str, llama: PreTrainedModel) -> None:
    run = Run()
    prune_model(Bundle(llama), settings(ids, pattern="0.6", skip=("*.[0-1].*", "*mlp*", "*.[qko]_proj")), run)
    assert any("0.6 was asked for; 0.593750 is the nearest" in warning for warning in run.warnings)


def test_owl_removes_less_where_outliers_are_and_reports_them(wide: PreTrainedModel, ids: str) -> None:
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    run = Run()
    bundle = prune_model(Bundle(wide), settings(ids, allocation={"owl": {"spread": 0.1}}, pattern="0.0"), run)
    assert all(torch.equal(before[name], tensor) for name, tensor in wide.state_dict().items())  # the pass only reads
    bundle = prune_model(Bundle(wide), settings(ids, allocation={"owl": {"spread": 0.1}}), run)
    found = run.metrics["allocation"]
    shares, sparsities = (list(found[key].values()) for key in ("outlier_share", "block_sparsity"))
    assert list(found["outlier_share"]) == [f"model.layers.{index}" for index in range(4)]
    assert np.argsort(shares).tolist() == np.argsort(sparsities)[::-1].tolist()
    assert max(sparsities) - min(sparsities) == pytest.approx(0.2)
    for name, pattern in bundle.patterns.items():
        block = ".".join(name.split(".")[:3])
        assert pattern.sparsity == pytest.approx(found["block_sparsity"][block], abs=1 / 72)


@pytest.mark.parametrize("allocation", ["owl", "global"])
def test_streamed_and_live_allocations_are_the_same_and_resume(
    wide: PreTrainedModel, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    wide.save_pretrained(tmp_path / "dense")
    config = settings(ids, method="magnitude", allocation=allocation)
    source = file_sha256(tmp_path / "dense" / "model.safetensors")

    def prune(out: str, **run: Any) -> tuple[Bundle, Run]:
        (tmp_path / out).mkdir(exist_ok=True)
        made = Run(folder=tmp_path / out, **run)
        return prune_model(open_bundle(str(tmp_path / "dense")), config, made), made

    whole, run = prune("whole")
    live = prune_model(Bundle(wide), config)
    assert whole.masks.sha256() == live.masks.sha256()
    assert file_sha256(tmp_path / "dense" / "model.safetensors") == source

    def stop(items: Any, total: int, label: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if label == "pruning" and index == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        prune("out", show=stop)
    monkeypatch.setattr(ALLOCATORS.get(allocation), "allocate", None)  # is not asked again
    again, resumed = prune("out")
    assert resumed.metrics["resumed_at_block"] == 2
    assert resumed.metrics["allocation"] == run.metrics["allocation"]
    for name in ("model.safetensors", "masks.safetensors", "compressllm.json"):
        assert file_sha256(tmp_path / "out/model" / name) == file_sha256(tmp_path / "whole/model" / name)
    assert again.patterns == whole.patterns
    assert json.loads((tmp_path / "out" / "allocation.json").read_text())["notes"] == run.metrics["allocation"]


def test_a_kept_allocation_of_other_settings_is_not_taken(wide: PreTrainedModel, ids: str, tmp_path: Path) -> None:
    for pattern in ("0.5", "0.7"):
        bundle = prune_model(
            Bundle(copy.deepcopy(wide)), settings(ids, pattern=pattern, allocation="owl"), Run(folder=tmp_path)
        )
        assert bundle.masks.sparsity() == pytest.approx(float(pattern), abs=1e-4)


def test_nm_cannot_be_spread(llama: PreTrainedModel, ids: str) -> None:
    with pytest.raises(RecipeError, match="spreads a fraction, and 2:4 removes the same everywhere"):
        prune_model(Bundle(llama), settings(ids, pattern="2:4", allocation="owl"))


def test_weights_that_are_not_finite_name_the_linear(llama: PreTrainedModel, ids: str) -> None:
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: holds 1 values"):
        prune_model(Bundle(llama), settings(ids, method="magnitude", allocation="global"))


# --- patterns by glob ---


def test_the_first_glob_that_matches_holds(llama: PreTrainedModel, ids: str) -> None:
    patterns = {"model.layers.0.*": "dense", "*.down_proj": "4:8", "*.2.*": "0.25/layer"}
    run = Run()
    bundle = prune_model(Bundle(llama), settings(ids, pattern="2:4", patterns=patterns, skip=("*.k_proj",)), run)
    assert not [name for name in bundle.masks if ".0." in name or name.endswith("k_proj")]
    assert bundle.patterns["model.layers.2.mlp.down_proj"] == NM(4, 8)
    assert bundle.patterns["model.layers.2.mlp.up_proj"] == Unstructured(0.25, "layer")
    assert bundle.patterns["model.layers.1.mlp.up_proj"] == NM(2, 4)
    assert bundle.masks.sparsity() == pytest.approx(run.metrics["asked_sparsity"], abs=1e-4)


@pytest.mark.parametrize("allocation", ["owl", "global"])
def test_linears_with_a_pattern_of_their_own_are_not_allocated(
    wide: PreTrainedModel, ids: str, allocation: str
) -> None:
    config = settings(ids, allocation=allocation, patterns={"*.down_proj": "2:4", "*.o_proj": "dense"})
    bundle = prune_model(Bundle(wide), config)
    rest = {name: linear for name, linear in all_linears(wide).items() if name[-9:] not in {"down_proj", "tn.o_proj"}}
    assert len(rest) == 4 * 5
    assert {str(bundle.patterns[name]) for name in bundle.patterns if name not in rest} == {"2:4"}
    gone = sum(int((~bundle.masks[name]).sum()) for name in rest)
    assert gone / sum(linear.weight.numel() for linear in rest.values()) == pytest.approx(0.6, abs=1e-4)


def test_globs_are_checked(llama: PreTrainedModel, ids: str) -> None:
    with pytest.raises(RecipeError, match=r"^patterns: '\*\.out' matches no linear; names look like model\.layers"):
        prune_model(Bundle(llama), settings(ids, patterns={"*.out": "2:4"}))
    with pytest.raises(PatternError, match=r"up_proj: 32 inputs are not a multiple of 24, as 12:24 needs"):
        prune_model(Bundle(llama), settings(ids, patterns={"*.up_proj": "12:24"}))
    with pytest.raises(RecipeError, match="leave no linear to prune"):
        prune_model(Bundle(llama), settings(ids, patterns={"*": "dense"}))
    with pytest.raises(ValueError, match="cannot read pattern 'denes'"):
        settings(ids, patterns={"*": "denes"})
