"""Nothing that comes with a checkpoint, a text or a recipe is run."""

import ast
import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import compressllm
from compressllm.calibration.source import open_source
from compressllm.core.errors import CalibrationError, CompressError, FormatError, RecipeError, UnsupportedModelError
from compressllm.eval.generation import generate_text
from compressllm.models.bundle import open_bundle
from compressllm.models.chattemplate import apply_template
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model, load_tokenizer
from compressllm.models.resolve import resolve_model
from compressllm.models.survey import damaged_files, survey
from compressllm.stages.recipe import read_recipe
from compressllm.stages.runner import check_sources

FILES = sorted(Path(compressllm.__file__).parent.rglob("*.py"))
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
READERS = {"from_pretrained", "from_config"}


def calls_of(path: Path) -> list[tuple[str, str, dict[str, ast.expr]]]:
    """Place, dotted name and keyword arguments of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords if word.arg}
            found.append((f"{path.name}:{node.lineno}", ast.unparse(node.func), keywords))
    return found


def test_the_package_imports_no_pickle() -> None:
    assert len(FILES) > 100
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not PICKLES & {name.partition(".")[0] for name in names}, f"{path}:{node.lineno}"


def test_the_package_calls_nothing_that_runs_what_it_reads() -> None:
    readers = 0
    for path in FILES:
        for where, name, keywords in calls_of(path):
            assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "yaml.unsafe_load"}, (
                where
            )
            for flag in ("shell", "allow_pickle", "trust_remote_code"):
                assert flag not in keywords or ast.unparse(keywords[flag]) == "False", f"{where}: {flag}"
            if name in {"np.load", "numpy.load"}:
                assert "allow_pickle" in keywords, where
            if name.startswith("Auto") and name.rpartition(".")[2] in READERS:
                readers += 1
                assert "trust_remote_code" in keywords, where
    assert readers >= 4


def read_all(folder: Path) -> None:
    """What inspect, verify, eval and generate read of a folder."""
    checkpoint = Checkpoint(folder)
    list(survey(checkpoint)[1])
    damaged_files(checkpoint)
    load_model(checkpoint)
    load_tokenizer(checkpoint)
    open_bundle(str(folder))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin", "optimizer.pt"]
)
def test_a_pickle_beside_the_weights_is_not_opened(
    model: Path, poison: bytes, pwned: Path, watch: Any, name: str
) -> None:
    (model / name).write_bytes(poison)
    with watch.on(model) as seen:
        read_all(model)
    assert not pwned.exists()
    assert seen == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_in_place_of_the_weights_is_refused(
    model: Path, poison: bytes, pwned: Path, watch: Any, name: str
) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(poison)
    with watch.on(model) as seen, pytest.raises(FormatError):
        read_all(model)
    assert not pwned.exists()
    assert seen == []


def test_the_poison_works(poison: bytes, pwned: Path, watch: Any, tmp_path: Path) -> None:
    with watch.on(tmp_path) as seen:
        pickle.loads(poison)
    assert pwned.exists()
    assert any("pickle.find_class" in one for one in seen)


def with_settings(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


AUTO_MAP = {
    "AutoConfig": "poisoned.Config",
    "AutoModelForCausalLM": "poisoned.Model",
    "AutoTokenizer": ["poisoned.Tokenizer", None],
}


@pytest.mark.parametrize("kind", ["poisoned", "llama"])
def test_code_beside_the_weights_is_not_run(
    model: Path, code: str, pwned: Path, watch: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whoever sits there
    (model / "poisoned.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    with_settings(model / "config.json", model_type=kind, auto_map=AUTO_MAP)
    with_settings(model / "tokenizer_config.json", auto_map=AUTO_MAP)
    with watch.on(model) as seen:
        if kind == "poisoned":
            with pytest.raises(UnsupportedModelError, match=r"config\.json: .*auto_map.*never run"):
                read_all(model)
        else:
            read_all(model)
            generate_text(load_model(model), load_tokenizer(Checkpoint(model)), "text", 2)
    assert not pwned.exists()
    assert seen == []


def test_a_tokenizer_that_is_code_is_not_run(model: Path, code: str, pwned: Path) -> None:
    (model / "poisoned.py").write_text(code)
    with_settings(model / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Tokenizer")
    with_settings(model / "config.json", auto_map=AUTO_MAP)
    with contextlib.suppress(CompressError):
        load_tokenizer(Checkpoint(model))
    assert not pwned.exists()


def test_a_gguf_file_is_read_without_what_lies_beside_it(
    model: Path, code: str, pwned: Path, poison: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (model / "poisoned.py").write_text(code)
    with_settings(model / "config.json", model_type="poisoned", auto_map=AUTO_MAP)
    for content in (poison, b"GGUF" + b"\xff" * 64, b"GGUF\x03\0\0\0" + b"\0" * 16):
        (model / "model.gguf").write_bytes(content)
        with pytest.raises(FormatError, match=r"model\.gguf: cannot be read as GGUF"):
            resolve_model(str(model / "model.gguf"))
    assert not pwned.exists()


def test_token_ids_that_are_objects_are_refused(tmp_path: Path, pwned: Path, poison: bytes) -> None:
    np.save(tmp_path / "ids.npy", np.array([[pickle.loads]], dtype=object), allow_pickle=True)
    header = (tmp_path / "ids.npy").read_bytes().partition(b"\n")[0] + b"\n"
    for content in (header + poison, poison):
        (tmp_path / "ids.npy").write_bytes(content)
        with pytest.raises(CalibrationError):
            open_source(str(tmp_path / "ids.npy")).read()
    assert not pwned.exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('PWNED') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__.__base__ }}{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir('PWNED') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "{{ 1 / 0 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ messages[7].content }}{{ nothing.at.all }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_reaches_nothing(template: str, pwned: Path, watch: Any, tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    messages = [{"role": "user", "content": "{{ 7 * 7 }} {% include '/etc/passwd' %}"}]
    assert apply_template(tokenizer, messages, answer_next=True) == messages[0]["content"]  # data is no template
    tokenizer.chat_template = template.replace("PWNED", str(pwned))
    with watch.on(tmp_path) as seen, pytest.raises(FormatError, match="the chat template refuses") as caught:
        apply_template(tokenizer, messages, answer_next=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not pwned.exists()
    assert seen == []


RECIPES = [
    "model: !!python/object/apply:os.mkdir [PWNED]\nstages: [eval]\n",
    "model: !!python/name:os.mkdir\nstages: [eval]\n",
    "model: demo\nstages: [eval]\n__import__('os').mkdir('PWNED'): 1\n",
    "model: demo\nstages:\n  - prune: {method: {os.mkdir: {path: PWNED}}}\n",
    "model: demo\nstages:\n  - prune: {method: compressllm.core.run}\n",
]


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_constructs_nothing(text: str, tmp_path: Path, pwned: Path, watch: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("PWNED", str(pwned)))
    with watch.on(tmp_path) as seen, pytest.raises(RecipeError):
        read_recipe(path)
    assert not pwned.exists()
    assert seen == []


@pytest.mark.parametrize(
    "source",
    ["$(mkdir PWNED).txt", "`mkdir PWNED`.txt", "|mkdir PWNED;.txt", "file:///etc/passwd", "http://127.0.0.1/x.txt"],
)
def test_a_path_in_a_recipe_is_only_a_path(source: str, tmp_path: Path, pwned: Path, watch: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps({"model": "demo", "stages": [{"eval": {"source": source.replace("PWNED", str(pwned))}}]})
    )
    recipe = read_recipe(path)
    with watch.on(tmp_path) as seen, pytest.raises(CompressError):
        check_sources(recipe)
    assert not pwned.exists()
    assert seen == []


def test_nesting_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for depth in (40, 3_000):
        path.write_text("model: " + "[" * depth + "]" * depth + "\nstages: [eval]\n")
        with pytest.raises(RecipeError, match="nested too deeply"):
            read_recipe(path)


def test_torch_was_asked_to_load_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    read_all(model)
