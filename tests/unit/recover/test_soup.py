"""Soups against an average written out, and everything that must not be averaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compressllm.core.errors import FormatError, RecipeError
from compressllm.export.writer import export_model
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import read_facts
from compressllm.models.survey import survey
from compressllm.recover.soup import Soup, choose_greedily
from compressllm.stages.soup import make_soup
from compressllm.stages.soupconfig import SoupConfig

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_mean_and_exactly_as_sparse(
    family: str, dtype: torch.dtype, member: Callable, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: PreTrainedModel = request.getfixturevalue(family).to(dtype)
    folders = [member(name, model, seed) for seed, name in enumerate("abc")]
    facts = make_soup([str(folder) for folder in folders], tmp_path / "soup")
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    soup = load_file(tmp_path / "soup" / "model.safetensors")
    assert soup.keys() == tensors[0].keys()
    for name, value in soup.items():
        mean = sum(one[name].double() for one in tensors) / 3
        assert torch.equal(value, mean.to(dtype)), name
    first, made = Checkpoint(folders[0]), Checkpoint(tmp_path / "soup")
    assert made.masks().sha256() == first.masks().sha256() == facts.masks_sha256
    count, rows = survey(made)
    assert count == len(facts.linears) > 0
    assert all(row.sound and row.sparsity == 0.5 for row in rows)
    assert facts == read_facts(tmp_path / "soup")
    assert facts.source["soup"]["method"] == "uniform"
    assert [one["folder"] for one in facts.source["soup"]["members"]] == ["a", "b", "c"]
    assert facts.source["soup"]["members"][1]["sha256"] == read_facts(folders[1]).sha256


def test_packed_members_and_a_packed_soup(member: Callable, llama: PreTrainedModel, tmp_path: Path) -> None:
    folders = [member(name, llama, seed) for seed, name in enumerate("ab")]
    export_model(Checkpoint(folders[1]), tmp_path / "packed", "packed")
    make_soup([str(folder) for folder in folders], tmp_path / "dense-soup")
    made = make_soup([str(folders[0]), str(tmp_path / "packed")], tmp_path / "soup", SoupConfig(format="packed"))
    assert made.format == "packed"
    one, other = Checkpoint(tmp_path / "soup"), Checkpoint(tmp_path / "dense-soup")
    assert all(torch.equal(one.read(name), other.read(name)) for name in other.specs)


def test_one_mask_bit_is_enough_to_refuse(member: Callable, llama: PreTrainedModel, tmp_path: Path) -> None:
    one, other = (member(name, llama, seed) for seed, name in enumerate("ab"))
    masks = load_file(other / "masks.safetensors")
    masks[Q][5, 0] ^= 1
    save_file(masks, other / "masks.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"b: its masks are not \S*a's, that of {Q} in 1 places") as caught:
        make_soup([str(one), str(other)], tmp_path / "soup")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "soup").exists()


def test_a_weight_outside_its_mask_is_refused(member: Callable, llama: PreTrainedModel, tmp_path: Path) -> None:
    one, other = (member(name, llama, seed) for seed, name in enumerate("ab"))
    tensors = load_file(other / "model.safetensors")
    place = (tensors[f"{Q}.weight"] == 0).nonzero()[0]
    tensors[f"{Q}.weight"][tuple(place)] = 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"b: {Q}.weight is not zero in 1 places where its mask prunes"):
        make_soup([str(one), str(other)], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    assert not list(tmp_path.glob(".soup*"))


def _without_masks(folder: Path) -> None:
    (folder / "masks.safetensors").unlink()


def _other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def _other_dtype(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_masks, "b: its masks are not .*only one of them has one of model.layers.0"),
        (_other_config, "b: its config differs from .* in rms_norm_eps"),
        (_other_dtype, r"b: model.norm.weight is not of the shape and dtype"),
    ],
)
def test_what_does_not_fit(spoil: Callable, says: str, member: Callable, llama: PreTrainedModel) -> None:
    folders = [member(name, llama, seed) for seed, name in enumerate("ab")]
    spoil(folders[1])
    with pytest.raises(FormatError, match=says):
        Soup(folders)


def test_models_without_masks_and_too_few(member: Callable, llama: PreTrainedModel, tmp_path: Path) -> None:
    one = member("a", llama, 0)
    with pytest.raises(RecipeError, match="at least 2"):
        make_soup([str(one)], tmp_path / "soup")
    with pytest.raises(FormatError, match="is given twice"):
        make_soup([str(one), str(one)], tmp_path / "soup")
    copied = Path(shutil.copytree(one, tmp_path / "bare"))
    (copied / "masks.safetensors").unlink()
    (copied / "compressllm.json").unlink()
    with pytest.raises(FormatError, match="bare: holds no masks"):
        Soup([copied, one])


def test_greedy_takes_what_does_not_hurt(member: Callable, llama: PreTrainedModel) -> None:
    """Loss: distance of one weight to a target, so that the right choice is known."""
    folders = [member(name, llama, seed) for seed, name in enumerate("abcd")]
    value = {folder: float(Checkpoint(folder).read("model.norm.weight")[0]) for folder in folders}
    near, far, *_ = sorted(folders, key=lambda folder: value[folder])
    target = (value[near] + value[far]) / 2 - 1e-6

    def loss(checkpoint: Checkpoint) -> float:
        return abs(float(checkpoint.read("model.norm.weight")[0]) - target)

    ranked = sorted(folders, key=lambda folder: abs(value[folder] - target))
    kept, best = [ranked[0]], abs(value[ranked[0]] - target)
    for folder in ranked[1:]:
        mean = sum(value[one] for one in [*kept, folder]) / (len(kept) + 1)
        if abs(mean - target) <= best:
            kept, best = [*kept, folder], abs(mean - target)
    chosen = choose_greedily(folders, loss)
    assert chosen.members == kept
    assert 1 < len(kept) < 4, "the case does not tell"
    assert [step["taken"] for step in chosen.tried] == [folder in kept for folder in ranked[1:]]
    assert list(chosen.alone) == [str(folder) for folder in ranked]
    assert chosen.loss == pytest.approx(best, abs=1e-6)
