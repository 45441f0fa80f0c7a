import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import compressllm
from compressllm.core.errors import FormatError, RecipeError, UnsupportedModelError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM
from compressllm.export import writer
from compressllm.export.sizes import exported_sizes
from compressllm.export.writer import export_model
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import read_facts
from compressllm.models.shards import file_sha256

UP = "model.layers.0.mlp.up_proj"


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def assert_same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(raw(tensor), raw(other[name])), name


def test_packs_a_folder_that_merely_holds_zeros(sparse_folder, sparse_model, tmp_path):
    facts = export_model(Checkpoint(sparse_folder), tmp_path / "packed", "packed")
    linears = all_linears(sparse_model)
    assert list(facts.linears) == list(linears)
    assert {str(one.pattern) for one in facts.linears.values()} == {"2:4"}
    assert facts == read_facts(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.packed.safetensors")
    assert tensors[f"{UP}.values"].shape == (48, 16)
    assert tensors[f"{UP}.bitmask"].shape == (48, 4)
    assert tensors[f"{UP}.weight"].numel() == 0
    assert tensors["model.layers.0.self_attn.q_proj.bias"].shape == (32,)
    sizes = exported_sizes(Checkpoint(tmp_path / "packed"))
    assert sizes.dense == sum(linear.weight.numel() * 2 for linear in linears.values())
    assert sizes.ratio == 0.5625
    assert config_of(tmp_path / "packed")["quantization_config"]["quant_method"] == "compressllm"


def test_stored_masks_are_trusted_over_zeros(masked_folder, tmp_path):
    source = Checkpoint(masked_folder)
    facts = export_model(source, tmp_path / "packed", "packed")
    back = Checkpoint(tmp_path / "packed")
    assert facts.masks_sha256 == source.masks().sha256() == back.masks().sha256()
    assert back.mask(UP)[1, :4].tolist() == [True, True, False, False]
    assert raw(back.read(f"{UP}.weight"))[1, :4].tolist() == [-32768, 0x3F80, 0, 0]  # -0.0 is kept


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_there_and_back(masked_folder, sparse_model, tmp_path, shard_bytes):
    export_model(Checkpoint(masked_folder), tmp_path / "packed", "packed", max_shard_bytes=shard_bytes)
    shards = sorted(path.name for path in (tmp_path / "packed").glob("*.safetensors"))
    if shard_bytes == 3000:
        assert shards[0].startswith("model.packed-00001-of-000")
        assert (tmp_path / "packed" / "model.safetensors.index.packed.json").exists()
    else:
        assert shards == ["model.packed.safetensors"]
    facts = export_model(Checkpoint(tmp_path / "packed"), tmp_path / "dense", "dense")
    assert facts.variant is None
    assert not {"quantization_config", "sparsity_config"} & config_of(tmp_path / "dense").keys()
    assert_same_bytes(
        load_file(tmp_path / "dense" / "model.safetensors"), load_file(masked_folder / "model.safetensors")
    )
    assert_same_bytes(
        load_file(tmp_path / "dense" / "masks.safetensors"), load_file(masked_folder / "masks.safetensors")
    )
    assert_same_bytes(
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict(), dict(sparse_model.state_dict())
    )
    export_model(Checkpoint(tmp_path / "dense"), tmp_path / "again", "packed", max_shard_bytes=shard_bytes)
    assert read_facts(tmp_path / "again").sha256 == read_facts(tmp_path / "packed").sha256


def test_facts_hold_the_hash_of_every_weight_file(masked_folder, tmp_path):
    facts = export_model(Checkpoint(masked_folder), tmp_path / "dense", "dense")
    assert set(facts.sha256) == {"model.safetensors", "masks.safetensors"}
    assert all(file_sha256(tmp_path / "dense" / name) == digest for name, digest in facts.sha256.items())


def test_negative_zero_at_a_pruned_place_becomes_positive(masked_folder, sparse_model, tmp_path):
    sparse_model.model.layers[0].mlp.up_proj.weight.data[1, 3] = -0.0
    sparse_model.save_pretrained(masked_folder)
    for format in ("dense", "packed"):
        export_model(Checkpoint(masked_folder), tmp_path / format, format)
        weight = Checkpoint(tmp_path / format).read(f"{UP}.weight")
        assert raw(weight)[1, :4].tolist() == [-32768, 0x3F80, 0, 0]


def test_only_some_linears_are_sparse(sparse_model, tmp_path):
    torch.nn.init.normal_(sparse_model.model.layers[0].mlp.up_proj.weight)
    sparse_model.save_pretrained(tmp_path / "some")
    facts = export_model(Checkpoint(tmp_path / "some"), tmp_path / "packed", "packed")
    assert UP not in facts.linears
    assert len(facts.linears) == 13
    assert f"{UP}.values" not in Checkpoint(tmp_path / "packed").stored_specs


def test_tokenizer_and_generation_config_come_along_but_no_foreign_index(sparse_folder, tmp_path):
    (sparse_folder / "tokenizer.json").write_text("{}")
    (sparse_folder / "pytorch_model.bin.index.json").write_text("{}")
    export_model(Checkpoint(sparse_folder), tmp_path / "packed", "packed")
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json", "compressllm.json"} <= names
    assert "pytorch_model.bin.index.json" not in names


def test_a_base_model_without_prefix(sparse_model, tmp_path):
    sparse_model.model.save_pretrained(tmp_path / "base")  # names lack `model.`
    facts = export_model(Checkpoint(tmp_path / "base"), tmp_path / "packed", "packed")
    assert "layers.0.mlp.up_proj" in facts.linears
    assert_same_bytes(
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="packed").state_dict(),
        dict(sparse_model.state_dict()),
    )


def test_nothing_to_pack(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "plain")
    with pytest.raises(FormatError, match="has no sparse linear"):
        export_model(Checkpoint(tmp_path / "plain"), tmp_path / "out", "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
    facts = export_model(Checkpoint(tmp_path / "plain"), tmp_path / "out", "dense")
    assert facts.linears == {}
    assert facts.masks_sha256 is None
    assert not (tmp_path / "out" / "masks.safetensors").exists()


def test_an_existing_folder_is_left_alone(sparse_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FormatError, match="holds something"):
        export_model(Checkpoint(sparse_folder), out, "packed")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    export_model(Checkpoint(sparse_folder), out, "packed")  # an empty folder will do


def test_a_file_in_the_way(sparse_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FormatError, match=r"holds something|cannot be written"):
            export_model(Checkpoint(sparse_folder), out, "packed")


def test_unknown_format(sparse_folder, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'packed'"):
        export_model(Checkpoint(sparse_folder), tmp_path / "out", "pakced")


def test_an_interrupted_export_leaves_nothing(sparse_folder, tmp_path):
    def interrupt(items, total, label):
        for number, item in enumerate(items):
            if label == "writing" and number == 5:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        export_model(Checkpoint(sparse_folder), tmp_path / "out", "packed", interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [sparse_folder.name]


def test_a_full_disk_is_one_line(sparse_folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compressllm.models.tensorfile.reserve", full)
    with pytest.raises(FormatError, match="cannot be written: No space left on device"):
        export_model(Checkpoint(sparse_folder), tmp_path / "out", "packed")
    assert not (tmp_path / "out").exists()


def test_what_reads_back_differently_is_never_kept(sparse_folder, tmp_path, monkeypatch):
    def flip_one_bit(checkpoint):
        path = next(path for path in checkpoint.files if path.suffix == ".safetensors")
        raw_bytes = bytearray(path.read_bytes())
        raw_bytes[-1] ^= 1  # in a bitmask, the last tensor of the file
        path.write_bytes(raw_bytes)

    real = writer._compare

    def compare(source, written, *rest):
        flip_one_bit(written)
        real(source, written, *rest)

    monkeypatch.setattr(writer, "_compare", compare)
    with pytest.raises(FormatError):
        export_model(Checkpoint(sparse_folder), tmp_path / "out", "packed")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", f"{UP}.weight"])
def test_comparison_sees_one_bit_of_any_tensor(sparse_folder, tmp_path, monkeypatch, name):
    read = Checkpoint.read

    def rotten(self, tensor):
        value = read(self, tensor)
        if tensor == name and self.folder.name.endswith(".partial"):
            raw(value).view(-1)[-1] ^= 1
        return value

    monkeypatch.setattr(Checkpoint, "read", rotten)
    with pytest.raises(FormatError, match=f"{name} reads back differently"):
        export_model(Checkpoint(sparse_folder), tmp_path / "out", "packed")


def test_a_mask_that_prunes_a_weight_is_refused(masked_folder, sparse_model, tmp_path):
    sparse_model.model.layers[0].mlp.up_proj.weight.data[1, 2:4] = 1.0
    sparse_model.save_pretrained(masked_folder)
    with pytest.raises(FormatError, match=f"{UP}.weight holds 2 weights that are not zero where its mask prunes"):
        export_model(Checkpoint(masked_folder), tmp_path / "out", "packed")


def test_a_quantised_source_is_refused(sparse_folder, tmp_path):
    config = config_of(sparse_folder) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (sparse_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        export_model(Checkpoint(sparse_folder), tmp_path / "out", "dense")


def test_a_truncated_packed_file(sparse_folder, tmp_path):
    export_model(Checkpoint(sparse_folder), tmp_path / "packed", "packed")
    path = tmp_path / "packed" / "model.packed.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        Checkpoint(tmp_path / "packed")


def test_a_bitmask_with_the_wrong_popcount(sparse_folder, tmp_path):
    export_model(Checkpoint(sparse_folder), tmp_path / "packed", "packed")
    path = tmp_path / "packed" / "model.packed.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] = 0xFF
    path.write_bytes(data)
    checkpoint = Checkpoint(tmp_path / "packed")
    with pytest.raises(FormatError, match="values, its bitmask keeps"):
        [checkpoint.read(name) for name in checkpoint.specs]


def test_lazy_export_attribute(sparse_folder, tmp_path):
    assert compressllm.export_model is export_model
    shutil.copytree(sparse_folder, tmp_path / "copy")
    facts = compressllm.export_model(Checkpoint(tmp_path / "copy"), tmp_path / "out", "dense")
    assert facts.format == "dense"
    assert NM(2, 4) in facts.patterns.values()
