import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compressllm.core.errors import CompressError, FormatError, UnsupportedModelError
from compressllm.core.pattern import NM
from compressllm.models.bundle import open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model, load_tokenizer, skeleton
from compressllm.models.resolve import replacing_folder, resolve_model


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = weights_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def assert_same_model(ours: PreTrainedModel, theirs: PreTrainedModel, ids: Tensor) -> None:
    assert type(ours) is type(theirs)
    assert not ours.training
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name
    for (name, buffer), (other, expected_buffer) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, expected_buffer), name
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_is_what_transformers_loads(
    decoder: PreTrainedModel, windows: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    decoder.to(dtype).save_pretrained(tmp_path / "m")
    assert_same_model(load_model(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m"), windows)


def test_another_dtype_rounds_as_transformers_does(tiny_llama_folder: Path, windows: Tensor) -> None:
    for dtype in (torch.float32, torch.float16):
        theirs = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=dtype)
        assert_same_model(load_model(tiny_llama_folder, dtype), theirs, windows)


def test_shards_load_as_one_file_does(llama: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert_same_model(load_model(tmp_path / "m"), llama, windows)


def test_tied_embeddings_are_stored_once_and_tied_again(
    llama: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    config = llama.config
    config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tied.save_pretrained(tmp_path / "m")
    assert "lm_head.weight" not in weights_of(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_model(loaded, tied, windows)


def test_a_head_that_differs_is_not_tied_whatever_the_config_says(tiny_llama_folder: Path, windows: Tensor) -> None:
    edit_config(tiny_llama_folder, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert_same_model(load_model(tiny_llama_folder), theirs, windows)


def test_a_checkpoint_of_the_base_model_loads_too(tiny_llama_folder: Path, windows: Tensor) -> None:
    expected = load_model(tiny_llama_folder)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tiny_llama_folder, strip)
    assert "layers.0.self_attn.q_proj.weight" in weights_of(tiny_llama_folder)
    assert_same_model(load_model(tiny_llama_folder), expected, windows)


def test_the_largest_linears_come_first_and_each_with_its_bias(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=3, attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    swapped = []

    def swap(name: str, linear: torch.nn.Linear) -> torch.nn.Linear:
        assert not any(parameter.is_meta for parameter in linear.parameters())
        swapped.append(linear.weight.numel())
        return linear

    loaded = load_model(tmp_path, swap=swap)
    assert swapped == sorted(swapped, reverse=True)
    assert len(swapped) == 3 * 7 + 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_the_generation_config_comes_along(tiny_llama_folder: Path) -> None:
    path = tiny_llama_folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.3, "do_sample": True}))
    assert load_model(tiny_llama_folder).generation_config.temperature == 0.3


def test_a_skeleton_has_no_weights_but_all_buffers(tiny_llama_folder: Path) -> None:
    model = skeleton(Checkpoint(tiny_llama_folder))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert not model.training


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def replace(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


QUANTISED = {"quant_method": "gptq", "bits": 4}
DAMAGE: dict[str, tuple[Callable[[Path], Any], type[CompressError], str]] = {
    "missing tensor": (
        drop("model.layers.1.mlp.up_proj.weight"),
        FormatError,
        "lacks tensor model.layers.1.mlp.up_proj.weight, which LlamaForCausalLM needs",
    ),
    "missing head that is not tied": (drop("lm_head.weight"), FormatError, "lacks tensor lm_head.weight"),
    "wrong shape": (
        replace("model.norm.weight", torch.ones(31)),
        FormatError,
        r"model.norm.weight has shape \(31,\), config.json implies \(32,\)",
    ),
    "transposed": (
        replace("model.layers.0.mlp.up_proj.weight", torch.ones(32, 48)),
        FormatError,
        r"up_proj.weight has shape \(32, 48\), config.json implies \(48, 32\)",
    ),
    "more blocks promised": (lambda f: edit_config(f, num_hidden_layers=4), FormatError, "lacks tensor model.layers.3"),
    "wrong width": (lambda f: edit_config(f, intermediate_size=64), FormatError, "config.json implies"),
    "heads that do not divide": (
        lambda f: edit_config(f, num_attention_heads=5),
        FormatError,
        "config.json: .*not a multiple of the number of attention heads",
    ),
    "no number": (lambda f: edit_config(f, hidden_size="wide"), FormatError, "'hidden_size' expected int, got str"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0, head_dim=None), FormatError, "config.json: .*zero"),
    "unknown architecture": (lambda f: edit_config(f, model_type="lama"), FormatError, "config.json"),
    "no causal model": (
        lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
        UnsupportedModelError,
        "cannot be built from its config",
    ),
    "quantised": (
        lambda f: edit_config(f, quantization_config=QUANTISED),
        UnsupportedModelError,
        r"is quantised \(gptq\); dequantise it first",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), FormatError, "holds no config.json"),
    "config cut off": (lambda f: (f / "config.json").write_text("{"), FormatError, "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), FormatError, "config.json"),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), FormatError, "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FormatError, "holds no model.safetensors"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]),
        FormatError,
        "is truncated",
    ),
    "damaged facts": (lambda f: (f / "compressllm.json").write_text("{"), FormatError, "compressllm.json"),
    "facts lack a field": (lambda f: (f / "compressllm.json").write_text("{}"), FormatError, "written_by"),
    "unknown format": (
        lambda f: (f / "compressllm.json").write_text('{"written_by": "9", "format": "zip"}'),
        CompressError,
        "unknown format 'zip'",
    ),
}


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_an_error_of_one_line(
    tiny_llama_folder: Path, damage: Callable[[Path], Any], kind: type[CompressError], message: str
) -> None:
    damage(tiny_llama_folder)
    with pytest.raises(kind, match=message) as caught:
        open_bundle(str(tiny_llama_folder))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(kind, match=message):
        load_model(tiny_llama_folder)


SPARSE: dict[str, tuple[str, str, str]] = {
    "a mask of what is not there": ("masks.safetensors", "model.layers.9.q", "which the checkpoint lacks"),
    "a mask of what is no linear": ("masks.safetensors", "model.norm", "the mask of model.norm does not fit"),
    "a mask of another shape": ("masks.safetensors", "lm_head", "the mask of lm_head does not fit its weight"),
    "facts of what is not there": ("compressllm.json", "model.layers.9.q", "which LlamaForCausalLM lacks"),
}


@pytest.mark.parametrize(("file", "linear", "message"), SPARSE.values(), ids=SPARSE.keys())
def test_masks_and_facts_that_do_not_fit_the_model_are_format_errors(
    tiny_llama_folder: Path, file: str, linear: str, message: str
) -> None:
    if file == "masks.safetensors":
        save_file({linear: torch.zeros(32, 1, dtype=torch.uint8)}, tiny_llama_folder / file)
    else:
        facts = {"written_by": "0", "linears": {linear: {"pattern": "2:4", "shape": [4, 4]}}}
        (tiny_llama_folder / file).write_text(json.dumps(facts))
    with pytest.raises(FormatError, match=message):
        open_bundle(str(tiny_llama_folder))


def test_masks_and_patterns_go_by_the_names_of_modules(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path)  # the base model, so the checkpoint's names lack its prefix
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(64, 32)}))
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    save_file({"layers.1.mlp.up_proj": torch.full((48, 4), 3, dtype=torch.uint8)}, tmp_path / "masks.safetensors")
    facts = {"written_by": "0", "linears": {"layers.1.mlp.up_proj": {"pattern": "2:8", "shape": [48, 32]}}}
    (tmp_path / "compressllm.json").write_text(json.dumps(facts))
    bundle = open_bundle(str(tmp_path))
    assert list(bundle.masks) == ["model.layers.1.mlp.up_proj"]
    assert bundle.masks["model.layers.1.mlp.up_proj"].sum() == 48 * 4 * 2
    assert bundle.patterns == {"model.layers.1.mlp.up_proj": NM(2, 8)}


def test_a_tokenizer_is_optional_but_must_be_whole(tiny_llama_folder: Path) -> None:
    checkpoint = Checkpoint(tiny_llama_folder)
    assert load_tokenizer(checkpoint) is None
    (tiny_llama_folder / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="tokenizer cannot be read") as caught:
        load_tokenizer(checkpoint)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_a_model_or_a_run_that_holds_one(tiny_llama_folder: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tiny_llama_folder)) == tiny_llama_folder
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(tiny_llama_folder, run / "model")
    assert resolve_model(str(run)) == run / "model"
    shutil.copytree(tiny_llama_folder / "", tmp_path / "both")
    shutil.copytree(tiny_llama_folder, tmp_path / "both" / "model")
    assert resolve_model(str(tmp_path / "both")) == tmp_path / "both"  # its own config counts first
    assert type(open_bundle(str(run)).model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "does not exist; give a model folder"),
        ("/nowhere/at/all", "does not exist"),
        ("~/nowhere/at/all", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
        ("no model", "does not exist"),
        ("nobody/nothing", "is no local model, and cannot be fetched from the hub"),
        ("nobody/nothing@main", "is no local model, and cannot be fetched from the hub"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        resolve_model(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_is_a_model_only_if_it_is_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FormatError, match="is a file; give a model folder"):
        resolve_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    with pytest.raises(FormatError, match="gguf") as caught:
        resolve_model(str(tmp_path / "broken.gguf"))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_a_replaced_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def convert(content: str, fail: bool) -> None:
        with replacing_folder(tmp_path / "cache" / "m") as work:
            (work / "config.json").write_text(content)
            if fail:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        convert("first", fail=True)
    assert list((tmp_path / "cache").iterdir()) == []
    convert("second", fail=False)
    convert("third", fail=False)  # another process was first: its folder stays
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["m"]
    assert (tmp_path / "cache" / "m" / "config.json").read_text() == "second"
