from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import MASKS_NAME, Checkpoint, write_masks
from compressllm.models.facts import Facts, LinearFacts
from compressllm.models.shards import file_sha256
from compressllm.models.survey import LinearSurvey, damaged_files, survey

NAME = "model.layers.1.mlp.up_proj"
WRONG = ("negative_zeros", "not_finite", "violations", "outside_mask")


def save(model: PreTrainedModel, folder: Path, masks: MaskStore | None = None) -> Checkpoint:
    model.save_pretrained(folder)
    if masks is not None:
        write_masks(folder / MASKS_NAME, masks)
        linears = {name: LinearFacts(pattern=NM(2, 4), shape=tuple(masks[name].shape)) for name in masks}
        files = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
        Facts(written_by="test", linears=linears, sha256=files).write(folder)
    return Checkpoint(folder)


def rows_of(checkpoint: Checkpoint, pattern: SparsityPattern | None = None) -> dict[str, LinearSurvey]:
    count, rows = survey(checkpoint, pattern)
    found = {row.name: row for row in rows}
    assert len(found) == count
    return found


@pytest.fixture
def pruned(llama: PreTrainedModel) -> tuple[PreTrainedModel, MaskStore]:
    """The tiny Llama with all linears but the first block's at 2:4."""
    masks = MaskStore()
    for name, linear in all_linears(llama).items():
        if ".0." not in name:
            masks[name] = NM(2, 4).keep(linear.weight.abs())
            linear.weight.data[~masks[name]] = 0.0
    return llama, masks


def test_a_dense_model_is_sound_unless_a_pattern_is_asked_of_it(llama: PreTrainedModel, tmp_path: Path) -> None:
    checkpoint = save(llama, tmp_path)
    rows = rows_of(checkpoint)
    assert list(rows) == list(all_linears(llama))
    assert all(row.sound and row.pattern is None and row.sparsity == 0.0 for row in rows.values())
    row = rows_of(checkpoint, NM(2, 4))[NAME]
    assert (row.pattern, row.violations, row.sound) == ("2:4", 48 * 32 // 4, False)
    assert rows_of(checkpoint, Unstructured(0.5, "row"))[NAME].violations == 48
    assert rows_of(checkpoint, Unstructured(0.5, "layer"))[NAME].violations == 1


@pytest.mark.parametrize("with_masks", [False, True])
def test_a_pruned_model_is_sound(pruned: tuple[PreTrainedModel, MaskStore], tmp_path: Path, with_masks: bool) -> None:
    model, masks = pruned
    checkpoint = save(model, tmp_path, masks if with_masks else None)
    rows = rows_of(checkpoint)
    assert all(row.sound for row in rows.values())
    row = rows[NAME]
    assert (row.shape, row.dtype, row.sparsity, row.zeros) == ((48, 32), "float32", 0.5, 48 * 32 // 2)
    assert row.pattern == ("2:4" if with_masks else None)
    assert row.facts()["sparsity"] == 0.5
    assert rows["model.layers.0.mlp.up_proj"].pattern is None
    assert rows_of(checkpoint, NM(2, 4))[NAME].sound
    assert not rows_of(checkpoint, NM(1, 4))[NAME].sound


def set_pruned(weight: Tensor, keep: Tensor, value: float, count: int = 3) -> None:
    for row, column in (~keep).nonzero()[:count].tolist():
        weight[row, column] = value


def set_kept(weight: Tensor, keep: Tensor, value: float, count: int = 3) -> None:
    for row, column in keep.nonzero()[:count].tolist():
        weight[row, column] = value


def move_one(weight: Tensor, keep: Tensor) -> None:
    """Keep another weight of the first group than the mask says, so that the pattern still holds."""
    weight[0, int(keep[0].nonzero()[0])] = 0.0
    weight[0, int((~keep[0]).nonzero()[0])] = 1.0


DAMAGE: dict[str, tuple[Callable[[Tensor, Tensor], Any], dict[str, int]]] = {
    "negative zero where pruned": (lambda w, k: set_pruned(w, k, -0.0), {"negative_zeros": 3}),
    "negative zero where kept": (lambda w, k: set_kept(w, k, -0.0), {}),
    "zero where kept": (lambda w, k: set_kept(w, k, 0.0), {}),
    "NaN": (lambda w, k: set_kept(w, k, float("nan")), {"not_finite": 3}),
    "infinite": (lambda w, k: set_kept(w, k, float("-inf"), 1), {"not_finite": 1}),
    "one weight too many": (lambda w, k: set_pruned(w, k, 1.0, 1), {"violations": 1, "outside_mask": 1}),
    "another mask of the pattern": (move_one, {"outside_mask": 1}),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_wrong_is_counted_where_it_is(
    pruned: tuple[PreTrainedModel, MaskStore],
    tmp_path: Path,
    damage: Callable[[Tensor, Tensor], Any],
    expected: dict[str, int],
) -> None:
    model, masks = pruned
    damage(model.get_submodule(NAME).weight.data, masks[NAME])
    rows = rows_of(save(model, tmp_path, masks))
    found = {name: getattr(rows[NAME], name) for name in WRONG}
    assert found == dict.fromkeys(WRONG, 0) | expected
    assert rows[NAME].sound == (not expected)
    assert all(row.sound for name, row in rows.items() if name != NAME)


def test_negative_zeros_count_without_masks_once_a_pattern_is_asked_for(
    pruned: tuple[PreTrainedModel, MaskStore], tmp_path: Path
) -> None:
    model, masks = pruned
    set_pruned(model.get_submodule(NAME).weight.data, masks[NAME], -0.0)
    checkpoint = save(model, tmp_path)
    assert rows_of(checkpoint)[NAME].negative_zeros == 0
    assert rows_of(checkpoint, NM(2, 4))[NAME].negative_zeros == 3


def test_a_pattern_that_does_not_fit_is_violated_by_every_row(llama: PreTrainedModel, tmp_path: Path) -> None:
    row = rows_of(save(llama, tmp_path), NM(2, 5))[NAME]
    assert (row.violations, row.sound) == (48, False)


def test_files_whose_bytes_changed_are_named(pruned: tuple[PreTrainedModel, MaskStore], tmp_path: Path) -> None:
    model, masks = pruned
    checkpoint = save(model, tmp_path, masks)
    assert damaged_files(checkpoint) == []
    for name in ("model.safetensors", MASKS_NAME):
        content = bytearray((tmp_path / name).read_bytes())
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
        assert damaged_files(checkpoint) == sorted({"model.safetensors", name})
    (tmp_path / MASKS_NAME).unlink()
    assert damaged_files(checkpoint) == [MASKS_NAME, "model.safetensors"]
    assert damaged_files(save(model, tmp_path / "no-facts")) == []


def test_a_checkpoint_of_the_base_model_is_surveyed_by_module_names(
    pruned: tuple[PreTrainedModel, MaskStore], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model, masks = pruned
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    bare = MaskStore({name.removeprefix("model."): masks.packed(name) for name in masks})
    write_masks(tmp_path / MASKS_NAME, bare)
    linears = {name: LinearFacts(pattern="2:4", shape=tuple(bare[name].shape)) for name in bare}
    Facts(written_by="test", linears=linears).write(tmp_path)
    row = rows_of(Checkpoint(tmp_path))[NAME]
    assert (row.pattern, row.sparsity, row.sound) == ("2:4", 0.5, True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bit_floats_are_looked_at(llama: PreTrainedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    weight = tensors[f"{NAME}.weight"]
    weight[0, :3] = torch.tensor([-0.0, float("nan"), 1.0])
    tensors[f"{NAME}.weight"] = weight.to(dtype)
    llama.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    row = rows_of(Checkpoint(tmp_path), NM(2, 4))[NAME]
    assert row.dtype == str(dtype).removeprefix("torch.")
    assert row.not_finite == 1
    assert row.negative_zeros >= 1
