import pytest
import torch
from torch import nn

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import quantize_absmax
from compressllm.core.registry import build
from compressllm.eval.decoding import Decoder
from compressllm.export.writer import export_model
from compressllm.kernels.linear import SparseLinear
from compressllm.kernels.swapper import Swapper
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model

PATTERN = NM(2, 4)


@pytest.fixture
def packed_folder(llama, tmp_path):
    """The tiny Llama at 2:4 in bfloat16, packed."""
    for linear in all_linears(llama).values():
        linear.weight.data[~PATTERN.keep(linear.weight.abs())] = 0.0
    llama.bfloat16().save_pretrained(tmp_path / "zeros")
    export_model(Checkpoint(tmp_path / "zeros"), tmp_path / "packed", "packed")
    return tmp_path / "packed"


def loaded(folder, dtype=None, **settings):
    bundle = open_bundle(str(folder))
    swapper = Swapper(bundle.masks, bundle.patterns, **settings)
    return bundle.live(dtype, "cpu", swapper), swapper


def test_a_loaded_model_computes_what_the_dense_one_does(packed_folder, windows):
    dense, (sparse, swapper) = load_model(packed_folder), loaded(packed_folder, backend="reference")
    assert torch.equal(sparse(windows).logits, dense(windows).logits)
    assert {choice.name for choice in swapper.choices.values()} == {"reference"}
    assert sum(isinstance(m, SparseLinear) for m in sparse.modules()) == len(swapper.choices) == 21
    before, after = dense.state_dict(), sparse.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_more_than_one_linear_is_dense_at_a_time(packed_folder):
    bundle = open_bundle(str(packed_folder))
    swapper, most = Swapper(bundle.masks, bundle.patterns, "reference"), []

    def swap(name, linear):
        seen[name] = swapper(name, linear)
        most.append(sum(isinstance(m, nn.Linear) for other, m in seen.items() if other != "lm_head"))
        return seen[name]

    seen = {}
    bundle.live(None, "cpu", swap)
    assert len(most) == 22  # the output head too, which stays
    assert max(most) == 0


def test_masks_of_a_packed_model_stay_on_disk(packed_folder, monkeypatch):
    monkeypatch.setattr(Checkpoint, "mask", lambda self, name: pytest.fail("was read"))
    masks = open_bundle(str(packed_folder)).masks
    assert isinstance(masks, MaskStore)
    assert masks.packed("model.layers.0.mlp.up_proj").shape == (48, 32)


def test_weights_are_rounded_as_they_come(packed_folder):
    plain, (rounded, _) = load_model(packed_folder), loaded(packed_folder, backend="reference", bits=4, group=32)
    name = "model.layers.1.mlp.down_proj"
    weight = plain.get_submodule(name).weight.detach()
    expected = quantize_absmax(weight, weight != 0, 4, 32).dequantize(torch.float32)
    assert torch.equal(rounded.get_submodule(name).weight, expected)


def test_what_cannot_run_is_found_before_any_weight_is_read(packed_folder, monkeypatch):
    bundle = open_bundle(str(packed_folder))
    shapes = {name: bundle.masks.packed(name).shape for name in bundle.masks}
    reference = BACKENDS.get("reference")
    monkeypatch.setattr(reference, "refuses", lambda *_, **__: "not today")
    with pytest.raises(BackendUnavailableError, match=r"^16x32 2:4: backend reference: not today"):
        Swapper(bundle.masks, bundle.patterns, "reference").choose_ahead(shapes, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_native_decodes_in_one_compiled_graph(packed_folder, dtype, windows):
    weight = torch.zeros(16, 32, dtype=dtype)
    if reason := build(BACKENDS, "native").refuses(weight, PATTERN):
        pytest.skip(f"native: {reason}")
    sparse, _ = loaded(packed_folder, dtype, backend="native")
    dense = load_model(packed_folder, dtype)
    plain, compiled = Decoder(dense, 20), Decoder(sparse, 20)
    compiled._next = torch.compile(compiled._forward, fullgraph=True, dynamic=False, backend="aot_eager")
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(compiled.prefill(windows[:2, :9]), plain.prefill(windows[:2, :9]), **tolerance)
    for at in range(9, 13):
        ids = windows[:2, at : at + 1]
        torch.testing.assert_close(compiled.step(ids), plain.step(ids), **tolerance)
