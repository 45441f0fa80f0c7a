import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import compressllm
from compressllm.core.errors import RecipeError
from compressllm.core.masks import raw
from compressllm.export.hf import PackedConfig, Swaps, Unpack
from compressllm.export.writer import export_model
from compressllm.kernels.linear import SparseLinear
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model
from compressllm.models.tensorfile import TensorFile, TensorFileWriter, TensorSpec

pytestmark = pytest.mark.usefixtures("plain_backends")


@pytest.fixture
def packed_folder(masked_folder, tmp_path) -> Path:
    export_model(Checkpoint(masked_folder), tmp_path / "packed", "packed")
    return tmp_path / "packed"


def assert_is(model, expected: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == dtype
        assert torch.equal(raw(state[name]), raw(tensor.to(dtype))), name


def test_our_loader_is_registered():
    assert "compressllm" in AUTO_QUANTIZER_MAPPING


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"dtype": "auto"}, {"device_map": "cpu"}],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "default",
)
@pytest.mark.parametrize("shard_bytes", [10**9, 3000], ids=["single", "sharded"])
def test_weights_are_bit_identical(masked_folder, sparse_model, tmp_path, shard_bytes, options):
    export_model(Checkpoint(masked_folder), tmp_path / "packed", "packed", max_shard_bytes=shard_bytes)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", variant="packed", output_loading_info=True, **options
    )
    wanted = options.get("dtype", torch.bfloat16)
    assert_is(model, sparse_model.state_dict(), torch.bfloat16 if wanted == "auto" else wanted)
    assert not any(info.values())
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)


def test_our_own_loader_agrees(packed_folder, sparse_model):
    model = load_model(packed_folder)
    assert_is(model, sparse_model.state_dict())
    assert not hasattr(model.config, "quantization_config")


def onto(backend: str) -> PackedConfig:
    return PackedConfig(backend=backend)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"device_map": "cpu"}], ids=str)
def test_loads_onto_a_backend(packed_folder, sparse_model, options):
    model, info = AutoModelForCausalLM.from_pretrained(
        packed_folder, variant="packed", quantization_config=onto("reference"), output_loading_info=True, **options
    )
    assert not any(info.values())
    linears = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(linears) == 14
    assert {m.backend for m in linears} == {"reference"}
    assert_is(model, sparse_model.state_dict(), options.get("dtype", torch.bfloat16))
    assert not any(m.bias is None or m.bias.is_meta for m in linears if m.out_features == 32 and m.in_features == 32)
    wanted = options.get("dtype", torch.bfloat16)
    ids, generating = torch.tensor([[1, 5, 9]]), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for cache in (None, "static"):
        ours = model.generate(ids, cache_implementation=cache, **generating)
        assert torch.equal(ours, sparse_model.to(wanted).generate(ids, **generating))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_model_on_a_backend_saves_as_a_plain_one(packed_folder, sparse_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed", quantization_config=onto("reference"))
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_is(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), sparse_model.state_dict())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_no_dense_copy_is_held_while_it_loads(packed_folder, monkeypatch):
    def held(model) -> int:
        return sum(p.untyped_storage().nbytes() for n, p in model.named_parameters() if "_proj.weight" in n)

    most = []
    install = Swaps.install_
    monkeypatch.setattr(Swaps, "install_", lambda self, model: (most.append(held(model)), install(self, model)))
    AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed", quantization_config=onto("reference"))
    assert most == [14 * 2]  # one element each


@pytest.mark.parametrize("set_before", [None, "0"])
def test_reading_ahead_is_off_during_a_load_only(packed_folder, monkeypatch, set_before):
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    gc.collect()  # of loads that failed
    monkeypatch.delenv(variable, raising=False)
    if set_before:
        monkeypatch.setenv(variable, set_before)
    during = []
    convert = Unpack.convert
    monkeypatch.setattr(
        Unpack, "convert", lambda self, *a, **k: (during.append(os.environ[variable]), convert(self, *a, **k))[1]
    )
    AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed")
    assert set(during) == {"1"}
    assert os.environ.get(variable) == set_before
    _rewrite(packed_folder / "model.packed.safetensors", lambda t: t.pop("model.layers.0.mlp.up_proj.bitmask"))
    with contextlib.suppress(RuntimeError):
        AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed")
    gc.collect()
    assert os.environ.get(variable) == set_before


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_backend_that_is_unknown_is_an_error(packed_folder):
    with pytest.raises(RecipeError, match="did you mean 'reference'"):
        AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed", quantization_config=onto("referense"))


def test_the_base_model_alone(packed_folder, sparse_model):
    assert_is(AutoModel.from_pretrained(packed_folder, variant="packed"), sparse_model.model.state_dict())


def test_generates_what_the_dense_model_generates(packed_folder, sparse_model):
    model = AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed")
    ids = torch.tensor([[1, 5, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), sparse_model.generate(ids, **options))


def test_a_loaded_model_saves_as_a_plain_one(packed_folder, sparse_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed").save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_is(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), sparse_model.state_dict())


def test_a_loaded_model_can_be_trained(packed_folder):
    model = AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_without_variant_it_is_refused_even_by_us(packed_folder):
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed_folder)


def test_packing_at_load_is_refused(sparse_folder):
    with pytest.raises(ValueError, match="packs at export"):
        AutoModelForCausalLM.from_pretrained(sparse_folder, quantization_config=PackedConfig(format="packed"))


def test_a_format_of_a_later_version_is_refused(packed_folder):
    config = json.loads((packed_folder / "config.json").read_text())
    config["quantization_config"]["format"] = "packet"
    (packed_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="unknown format 'packet'"):
        AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed")


def _rewrite(path: Path, change) -> None:
    file = TensorFile(path)
    tensors = {name: file.read(name) for name in file.specs}
    change(tensors)
    path.unlink()
    writer = TensorFileWriter(path, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


@pytest.mark.parametrize("damage", ["popcount", "no bitmask", "no values"])
def test_damage_raises_instead_of_random_weights(packed_folder, damage):
    name = "model.layers.0.mlp.up_proj"

    def change(tensors):
        if damage == "popcount":
            tensors[f"{name}.bitmask"][0, 0] |= 0xFF
        else:
            del tensors[f"{name}.{damage.removeprefix('no ')}"]

    _rewrite(packed_folder / "model.packed.safetensors", change)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(packed_folder, variant="packed")


def run_python(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(compressllm.__file__).parents[1],  # whence it is importable, installed or not
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_transformers_refuses_it_and_opens_the_dense_one(packed_folder, sparse_model, tmp_path):
    export_model(Checkpoint(packed_folder), tmp_path / "dense", "dense")
    torch.save(sparse_model.state_dict(), tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
packed, dense, expected = sys.argv[1:]
for options, kind in (({}, OSError), ({"variant": "packed"}, RuntimeError)):
    try:
        AutoModelForCausalLM.from_pretrained(packed, **options)
    except kind:
        print("refused", options)
state, expected = AutoModelForCausalLM.from_pretrained(dense).state_dict(), torch.load(expected)
assert state.keys() == expected.keys() and state
assert all(torch.equal(state[k].view(torch.int16), v.view(torch.int16)) for k, v in expected.items())
assert "compressllm" not in sys.modules
"""
    out = run_python(code, packed_folder, tmp_path / "dense", tmp_path / "expected.pt")
    assert out.splitlines() == ["refused {}", "refused {'variant': 'packed'}"]


def test_import_compressllm_is_light_and_enough(packed_folder, sparse_model, tmp_path):
    torch.save(sparse_model.state_dict(), tmp_path / "expected.pt")
    code = """
import sys, compressllm
assert not {"torch", "transformers", "pydantic"} & sys.modules.keys()
import torch
from transformers import AutoModelForCausalLM
state = AutoModelForCausalLM.from_pretrained(sys.argv[1], variant="packed").state_dict()
expected = torch.load(sys.argv[2])
assert state.keys() == expected.keys() and state
assert all(torch.equal(state[k].view(torch.int16), v.view(torch.int16)) for k, v in expected.items())
"""
    run_python(code, packed_folder, tmp_path / "expected.pt")
