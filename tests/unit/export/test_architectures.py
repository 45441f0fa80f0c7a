"""One architecture of every form linears are held in, from a dense checkpoint to a packed one and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.export.sizes import exported_sizes
from compressllm.export.writer import export_model
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model
from compressllm.models.survey import survey
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.stages.evaluate import prepare

FORMS = pytest.mark.parametrize("decoder", ["llama", "gpt2", "mixtral", "qwen2moe"], indirect=True)

pytestmark = pytest.mark.usefixtures("plain_backends")


@pytest.fixture
def pruned(decoder: PreTrainedModel, windows: Tensor, tmp_path: Path) -> Checkpoint:
    """The model pruned to 2:4 from disk in bfloat16; its second linear is left dense."""
    decoder.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    np.save(tmp_path / "ids.npy", windows.numpy())
    (tmp_path / "pruned").mkdir()
    config = PruneConfig(
        pattern="2:4", skip=(list(all_linears(decoder))[1],), calibration={"source": str(tmp_path / "ids.npy")}
    )
    prune_model(open_bundle(str(tmp_path / "dense")), config, Run(folder=tmp_path / "pruned"))
    return Checkpoint(tmp_path / "pruned" / "model")


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: raw(checkpoint.read(name)) for name in checkpoint.specs}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@FORMS
def test_what_is_packed_loads_as_it_was(
    pruned: Checkpoint, decoder: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    count, rows = survey(pruned)
    rows = list(rows)
    assert [row.name for row in rows] == list(all_linears(decoder))
    assert [row.shape for row in rows] == [linear.shape for linear in all_linears(decoder).values()]
    assert all(row.sound for row in rows)
    assert [row.pattern for row in rows] == ["2:4", None, *["2:4"] * (count - 2)]
    expected, logits = tensors(pruned), load_model(pruned)(windows).logits

    export_model(pruned, tmp_path / "packed", "packed")
    packed = Checkpoint(tmp_path / "packed")
    assert exported_sizes(packed).ratio == 0.5625
    assert_same(tensors(packed), expected)
    assert packed.specs == pruned.specs
    assert packed.masks().sha256() == pruned.masks().sha256()
    assert all(row.sound for row in survey(packed)[1])
    assert torch.equal(load_model(packed)(windows).logits, logits)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="packed", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(stock(windows).logits, logits)
    stock.save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "resaved")
    assert Checkpoint(tmp_path / "saved").specs == Checkpoint(tmp_path / "resaved").specs

    live, backends = prepare(open_bundle(str(tmp_path / "packed")), EvalConfig(dtype="bfloat16", device="cpu"))
    assert torch.equal(live(windows).logits, logits)
    assert backends["linears"] == {"dense": count - 1}

    export_model(packed, tmp_path / "again", "dense")
    assert_same(tensors(Checkpoint(tmp_path / "again")), expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(windows).logits, logits)


@FORMS
def test_zeros_alone_are_found(pruned: Checkpoint, tmp_path: Path) -> None:
    load_model(pruned).save_pretrained(tmp_path / "zeros")
    facts = export_model(Checkpoint(tmp_path / "zeros"), tmp_path / "packed", "packed")
    assert pruned.facts is not None
    assert facts.linears == pruned.facts.linears
    assert facts.masks_sha256 == pruned.facts.masks_sha256


@pytest.mark.parametrize("decoder", ["mixtral"], indirect=True)
def test_experts_of_which_some_are_packed(decoder: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path / "dense")
    (tmp_path / "pruned").mkdir()
    skip = ("*.1.mlp.experts.0.*", "*.experts.2.up_proj", "*.2.mlp.experts.*.down_proj")
    config = PruneConfig(method="magnitude", skip=skip)
    bundle = prune_model(open_bundle(str(tmp_path / "dense")), config, Run(folder=tmp_path / "pruned"))
    assert len(bundle.masks) == len(all_linears(decoder)) - 3 - 3 - 4
    pruned = Checkpoint(tmp_path / "pruned" / "model")
    export_model(pruned, tmp_path / "packed", "packed")
    expected = load_model(pruned).state_dict()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="packed").state_dict()
    assert_same(stock, expected)
    assert_same(load_model(tmp_path / "packed").state_dict(), expected)


@pytest.mark.parametrize("decoder", ["mixtral"], indirect=True)
@pytest.mark.parametrize("part", ["values", "bitmask"])
def test_an_expert_that_lacks_a_part_is_an_error(pruned: Checkpoint, part: str, tmp_path: Path) -> None:
    export_model(pruned, tmp_path / "packed", "packed")
    file = tmp_path / "packed" / "model.packed.safetensors"
    kept = load_file(file)
    kept.pop(f"model.layers.1.block_sparse_moe.experts.3.w3.{part}")
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="packed")
    with pytest.raises(FormatError, match=r"(no|lacks) tensor model.*\.experts\.3\."):
        load_model(tmp_path / "packed")
