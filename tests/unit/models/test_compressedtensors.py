"""Checkpoints that compressed-tensors wrote up to 0.14, made here from their description, and what becomes of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compressllm.core.errors import CompressError, FormatError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM
from compressllm.export.sizes import exported_sizes
from compressllm.export.writer import export_model
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.compressedtensors import BitmaskCheckpoint
from compressllm.models.loading import load_model

UP = "model.layers.0.mlp.up_proj"


def bits_of(keep: Tensor) -> Tensor:
    """One bit a weight, the lowest first, place by place."""
    rows = []
    for row in keep.tolist():
        row = row + [False] * (-len(row) % 8)
        rows.append(
            [sum(bit << at for at, bit in enumerate(row[start : start + 8])) for start in range(0, len(row), 8)]
        )
    return torch.tensor(rows, dtype=torch.uint8)


def compressed(name: str, weight: Tensor, keep: Tensor, form: str) -> dict[str, Tensor]:
    values = torch.stack([value for row, kept in zip(weight, keep, strict=True) for value in row[kept]])
    parts = {"compressed": values, "bitmask": bits_of(keep), "shape": torch.tensor(weight.shape).view(-1, 1)}
    if form == "sparse-24-bitmask":
        parts["compressed"] = values.view(weight.shape[0], -1)
    else:
        parts["row_offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)[:-1]])
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


@pytest.fixture
def model() -> LlamaForCausalLM:
    """2:4 in bfloat16, with a kept -0.0 and a group of which one weight is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for linear in all_linears(model).values():
        linear.weight.data[~NM(2, 4).keep(linear.weight.float().abs())] = 0.0
    model.get_submodule(UP).weight.data[1, :4] = torch.tensor([-0.0, 1.0, 0.0, 0.0])
    return model


@pytest.fixture
def write(model: LlamaForCausalLM, tmp_path: Path):
    """``write("sparse-24-bitmask")``: the model as that format stores it."""

    def to_folder(form: str, *, suffix: str = "", key: str = "quantization_config", **changes) -> Path:
        folder = tmp_path / "old"
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        for name in all_linears(model):
            weight = tensors.pop(f"{name}.weight")
            keep = weight != 0
            if form == "sparse-24-bitmask":
                keep = NM(2, 4).keep((weight != 0).float())
                if name == UP:
                    keep[1, :4] = torch.tensor([True, True, False, False])
            tensors |= compressed(name + suffix, weight, keep, form)
        save_file(tensors | changes.pop("tensors", {}), folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        sparsity = {"format": form, "global_sparsity": 0.5, "ignore": ["lm_head"], "targets": ["Linear"]}
        config[key] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity | changes}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return to_folder


def plain(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


def assert_same(folder: Path, expected: dict[str, Tensor]) -> None:
    found = Checkpoint(folder)
    assert found.specs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(raw(found.read(name)), tensor), name


def test_the_byte_of_the_description() -> None:
    assert bits_of(torch.tensor([[False, True, True, False, True, False, False, True]])).tolist() == [[0x96]]


@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
def test_converted_bit_for_bit(write, model, tmp_path: Path, form: str, format: str) -> None:
    expected = plain(model)
    if form == "sparse-bitmask":  # which keeps what is not zero, and -0.0 is
        expected[f"{UP}.weight"][1, 0] = 0
    facts = export_model(BitmaskCheckpoint(write(form)), tmp_path / "new", format)
    assert list(facts.linears) == list(all_linears(model))
    assert_same(tmp_path / "new", expected)
    if form == "sparse-24-bitmask":
        assert {str(linear.pattern) for linear in facts.linears.values()} == {"2:4"}
        assert Checkpoint(tmp_path / "new").mask(UP)[1, :4].tolist() == [True, True, False, False]
        ratio = exported_sizes(Checkpoint(tmp_path / "new")).ratio
        assert 0.5625 < ratio < 0.564 if format == "packed" else ratio == 1.0  # 44 inputs fill no whole bytes
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") == ("compressllm" if format == "packed" else None)
    if format == "dense":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
        assert all(torch.equal(raw(tensor), expected[name]) for name, tensor in stock.state_dict().items())


def test_names_and_key_of_before_2025(write, model, tmp_path: Path) -> None:
    export_model(
        BitmaskCheckpoint(write("sparse-24-bitmask", suffix=".weight", key="compression_config")),
        tmp_path / "new",
        "dense",
    )
    assert_same(tmp_path / "new", plain(model))
    assert "compression_config" not in json.loads((tmp_path / "new" / "config.json").read_text())


def test_codes_become_plain_weights(write, model, tmp_path: Path) -> None:
    """int8 codes and a scale a row, as W8A8 on top of 2:4 has them."""
    folder = write("sparse-24-bitmask")
    tensors = load_file(folder / "model.safetensors")
    scales = torch.rand(44, 1) + 0.5
    codes = torch.randint(-127, 128, tensors[f"{UP}.compressed"].shape, dtype=torch.int8)
    tensors |= {f"{UP}.compressed": codes, f"{UP}.weight_scale": scales, f"{UP}.input_scale": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")
    source = BitmaskCheckpoint(folder)
    assert source.quantised
    export_model(source, tmp_path / "new", "packed")
    weight = Checkpoint(tmp_path / "new").read(f"{UP}.weight")
    keep = Checkpoint(tmp_path / "new").mask(UP)
    assert torch.equal(weight[keep].view(44, 16), (codes.float() * scales).bfloat16())
    assert not weight[~keep].any()


def test_other_commands_say_what_to_do(write) -> None:
    with pytest.raises(CompressError, match="`compressllm convert` reads it"):
        open_bundle(str(write("sparse-24-bitmask")))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("compressed", torch.zeros(44, 15, dtype=torch.bfloat16), "has 660 values, its bitmask keeps 704"),
        ("bitmask", torch.zeros(44, 3, dtype=torch.uint8), "does not fit its shape"),
        ("shape", torch.tensor([[44], [0]]), r"having shape \(44, 0\)"),
        ("shape", None, r"lacks its tensor model.layers.0.mlp.up_proj.shape"),
        ("weight_zero_point", torch.ones(1), "has zero points"),
    ],
)
def test_what_does_not_fit_is_refused(write, tmp_path: Path, tensor: str, value, message: str) -> None:
    folder = write("sparse-24-bitmask")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{tensor}"] = value
    if tensor.startswith("weight_"):
        tensors[f"{UP}.weight_scale"] = torch.ones(1)
    save_file({name: each for name, each in tensors.items() if each is not None}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=message):
        export_model(BitmaskCheckpoint(folder), tmp_path / "new", "packed")
    assert not (tmp_path / "new").exists()


def test_what_is_another_format_is_refused(write, model, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="marlin-24, which was never made to be read back"):
        BitmaskCheckpoint(write("sparse-24-bitmask", format="marlin-24"))
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(FormatError, match="nothing to convert"):
        BitmaskCheckpoint(tmp_path / "plain")


def test_zeros_in_place_are_converted_too(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["quantization_config"] = {"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    facts = export_model(BitmaskCheckpoint(tmp_path / "old"), tmp_path / "new", "packed")
    assert {str(linear.pattern) for linear in facts.linears.values()} == {"2:4"}
    ids = torch.arange(8).view(1, -1)
    assert torch.equal(load_model(Checkpoint(tmp_path / "new"))(ids).logits, model(ids).logits)
