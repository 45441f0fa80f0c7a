"""Every mistake a user makes: one clear line, exit code 2, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

FAST = ("--samples", 4, "--seqlen", 64)


@pytest.fixture
def refused(cli: Callable, tmp_path: Path) -> Callable:
    """Run a command that writes to ``out``; hold that it fails in one line that says ``words`` and leaves nothing."""

    def run(*arguments: object, says: tuple[str, ...]) -> str:
        out = tmp_path / "out"
        done = cli(*[out if argument == "OUT" else argument for argument in arguments])
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.code == 2, done
        assert len(errors) == 1, done.err
        assert "Traceback" not in done.err
        for word in says:
            assert word in errors[0], errors[0]
        assert done.out == ""
        assert not out.exists()
        assert not list(tmp_path.glob(".*")), "scratch files were left behind"
        return errors[0]

    return run


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--method", "wnada"), ("unknown pruner 'wnada'", "did you mean 'wanda'", "magnitude")),
        (("--method", "{wanda: {powre: 1}}"), ("wanda", "unknown option 'powre'")),
        (("--pattern", "3:2"), ("3:2", "0 < N < M")),
        (("--pattern", "2:2"), ("2:2",)),
        (("--pattern", "1.5"), ("outside 0 to 1",)),
        (("--pattern", "half"), ("cannot read pattern 'half'",)),
        (("--pattern", "2:7"), ("model.layers.0.self_attn.q_proj", "not a multiple of 7", "skip")),
        (("--skip", "*.nothing"), ("'*.nothing' matches no linear",)),
        (("--skip", "*"), ("leaves no linear",)),
        (("--samples", "0"), ("samples", "greater than or equal to 1")),
        (("--seqlen", "100000"), ("100000",)),
        (("--data", "wikitext3"), ("unknown text source 'wikitext3'", "did you mean 'wikitext2'")),
        (("--data", "missing.txt"), ("missing.txt", "does not exist")),
        (("--dtype", "float12"), ("dtype", "float12")),
        (("--masks", "nowhere/at/all"), ("masks: wanda does not start from a given mask", "dsnot")),
        (("--method", "dsnot", "--masks", "./nowhere"), ("nowhere", "does not exist")),
        (("--method", "{dsnot: {cycles: 0}}"), ("dsnot", "cycles 0")),
    ],
    ids=str,
)
def test_flags(refused: Callable, tiny: str, text: str, flags: tuple[str, ...], says: tuple[str, ...]) -> None:
    data = () if "--data" in flags else ("--data", text)
    refused("prune", tiny, "OUT", *data, *flags, says=says)


def test_masks_of_a_dense_model(refused: Callable, tiny: str, text: str) -> None:
    flags = ("--method", "dsnot", "--masks", tiny)
    refused("prune", tiny, "OUT", "--data", text, *flags, says=("masks: ", "none of the linears", "give a pruned"))


@pytest.mark.parametrize("content", ["", "   \n\n", "too short"], ids=["empty", "blank", "short"])
def test_text_that_is_too_short(refused: Callable, tiny: str, tmp_path: Path, content: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    refused("prune", tiny, "OUT", "--data", path, *FAST, says=("text.txt",))


def test_token_ids_outside_the_vocabulary(refused: Callable, tiny: str, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.full((2, 64), 99_999))
    refused("prune", tiny, "OUT", "--data", tmp_path / "ids.npy", says=("99999",))


def test_token_ids_of_another_shape_or_kind(refused: Callable, tiny: str, tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(64, dtype=np.int64))
    refused("prune", tiny, "OUT", "--data", tmp_path / "flat.npy", says=("flat.npy",))
    np.save(tmp_path / "float.npy", np.zeros((2, 64)))
    refused("prune", tiny, "OUT", "--data", tmp_path / "float.npy", says=("float.npy",))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused("prune", tiny, "OUT", "--data", tmp_path / "pickled.npy", says=("pickled.npy",))


@pytest.fixture
def broken(tiny: str, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def test_model_that_is_not_there(refused: Callable, tmp_path: Path) -> None:
    refused("prune", tmp_path / "nowhere", "OUT", says=("nowhere", "does not exist"))
    (tmp_path / "empty").mkdir()
    refused("prune", tmp_path / "empty", "OUT", says=("config.json",))


def test_missing_weights(refused: Callable, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused("prune", broken, "OUT", says=("model.safetensors",))


def test_truncated_weights(refused: Callable, broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused("prune", broken, "OUT", says=("model.safetensors", "truncated"))


def test_pickled_weights_are_not_read(refused: Callable, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused("prune", broken, "OUT", says=("pytorch_model.bin", "pickled"))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_wrong_config(refused: Callable, broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    refused("prune", broken, "OUT", says=("config.json",) if content != "{}" else ())


def test_config_of_another_shape(refused: Callable, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 4096}))
    refused("prune", broken, "OUT", says=("shape", "4096"))


def test_quantised_config(refused: Callable, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refused("prune", broken, "OUT", says=("gptq", "dequantise"))


def _set_weight(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_finite(refused: Callable, broken: Path, text: str) -> None:
    _set_weight(broken, "model.layers.1.mlp.up_proj.weight", float("nan"))
    says = ("model.layers.1.mlp.up_proj", "not finite")
    refused("prune", broken, "OUT", "--method", "magnitude", says=says)


def test_activations_that_are_not_finite(refused: Callable, broken: Path, text: str) -> None:
    _set_weight(broken, "model.layers.1.input_layernorm.weight", float("inf"))
    says = ("model.layers.1.self_attn", "activations are not finite")
    refused("prune", broken, "OUT", "--data", text, *FAST, says=says)


def test_output_that_holds_something_else(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for command in (("prune", tiny, tmp_path / "out", "--data", text), ("export", tiny, tmp_path / "out")):
        done = cli(*command)
        assert done.code == 2
        assert "error: " in done.err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
    done = cli("prune", tiny, tmp_path / "out" / "precious.txt", "--data", text)
    assert done.code == 2
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_output_that_cannot_be_written(refused: Callable, tiny: str, text: str) -> None:
    refused("prune", tiny, "/proc/nowhere/out", "--data", text, says=("/proc/nowhere",))


def test_run_of_another_recipe(cli: Callable, tiny: str, tmp_path: Path) -> None:
    assert cli("prune", tiny, tmp_path / "out", "--method", "magnitude").code == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    done = cli("prune", tiny, tmp_path / "out", "--method", "random")
    assert done.code == 2
    assert "another recipe (stages.0.prune.method: 'magnitude' then, 'random' now);" in done.err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert cli("prune", tiny, tmp_path / "out", "--method", "magnitude", "--no-resume").code == 2


def test_packed_folder_is_refused_by_stock_transformers(cli: Callable, tiny: str, tmp_path: Path) -> None:
    assert cli("prune", tiny, tmp_path / "run", "--method", "magnitude").code == 0
    assert cli("export", tmp_path / "run", tmp_path / "packed").code == 0
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'packed')!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode != 0
    assert "model.safetensors" in done.stderr


def test_export_of_a_dense_model_as_packed(refused: Callable, tiny: str) -> None:
    refused("export", tiny, "OUT", says=("sparse",))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--baseline", "no-such.json"), ("no-such.json", "--write-baseline")),
        (("--max-increase", "lots"), ("lots", "1%")),
        (("--backend", "cuda-magic"), ("unknown backend 'cuda-magic'",)),
    ],
)
def test_eval_flags(refused: Callable, tiny: str, text: str, flags: tuple[str, ...], says: tuple[str, ...]) -> None:
    refused("eval", tiny, "--data", text, "--windows", 2, "--seqlen", 64, *flags, says=says)


def test_usage_errors_exit_2(cli: Callable, tiny: str) -> None:
    assert cli("prune", tiny).code == 2
    assert cli("prune", tiny, "out", "--no-such-flag").code == 2
    assert cli("no-such-command").code == 2


def test_cuda_asked_for_where_there_is_none(refused: Callable, tiny: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused("prune", tiny, "OUT", "--method", "magnitude", "--device", "cuda", says=("device cuda", "--device cpu"))
