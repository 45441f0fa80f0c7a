import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from compressllm.core.errors import CalibrationError, FormatError, RecipeError
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.select import pool as pool_module
from compressllm.select.config import SelectConfig
from compressllm.select.divergence import response_divergence
from compressllm.select.pool import Pool
from compressllm.select.records import Record

TINY = Path(__file__).parents[2] / "tiny" / "model"
RECORDS = [
    Record((("user", f"Question {one}?" * (1 + one % 3)),), f"Answer {one}." * (1 + one % 5)) for one in range(40)
]
CONFIG = SelectConfig(device="cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dense() -> Bundle:
    return open_bundle(str(TINY))


@pytest.fixture
def pruned(dense: Bundle, tmp_path: Path) -> Bundle:
    model = dense.live()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data[weight.abs() < 0.5 * weight.std()] = 0
    model.save_pretrained(tmp_path / "pruned")
    assert dense.tokenizer is not None
    dense.tokenizer.save_pretrained(tmp_path / "pruned")
    return open_bundle(str(tmp_path / "pruned"))


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**9) -> list[int]:
    """Sizes of the batches that go through the models; breaks off after some."""
    sizes: list[int] = []

    def compare(dense: PreTrainedModel, pruned: PreTrainedModel, batch: Any) -> torch.Tensor:
        if len(sizes) == stop_after:
            raise KeyboardInterrupt
        sizes.append(len(batch))
        return response_divergence(dense, pruned, batch)

    monkeypatch.setattr(pool_module, "response_divergence", compare)
    return sizes


def test_compares_each_record_once(dense: Bundle, pruned: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = counting(monkeypatch)
    pool = Pool(RECORDS, dense, pruned, CONFIG, Run())
    some = pool.divergence([7, 3, 7])
    assert sum(sizes) == 2
    every = pool.divergence(range(40))
    assert sum(sizes) == 40
    assert torch.equal(some, every[[7, 3, 7]])
    live, other = dense.live(), pruned.live()
    for one in (0, 19, 39):
        expected = response_divergence(live, other, [pool.encoded[one]])[0]
        torch.testing.assert_close(every[one], expected, rtol=1e-4, atol=1e-6)
    assert (every[:, 0] > 1e-3).all()
    assert pool.lengths.tolist() == [len(one.ids) for one in pool.encoded]
    assert pool.response_lengths.tolist() == [len(one.ids) - one.start for one in pool.encoded]


def test_a_killed_comparison_goes_on_to_the_same_bits(
    dense: Bundle, pruned: Bundle, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    whole = Pool(RECORDS, dense, pruned, CONFIG, Run()).divergence(range(40))
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "other"))
    sizes = counting(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        Pool(RECORDS, dense, pruned, CONFIG, Run()).divergence(range(40))
    done = sum(sizes)
    assert 0 < done < 40
    sizes = counting(monkeypatch)
    assert torch.equal(Pool(RECORDS, dense, pruned, CONFIG, Run()).divergence(range(40)), whole)
    assert sum(sizes) == 40 - done


def test_another_model_is_compared_anew(dense: Bundle, pruned: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool(RECORDS, dense, pruned, CONFIG, Run()).divergence(range(4))
    sizes = counting(monkeypatch)
    assert Pool(RECORDS, dense, dense, CONFIG, Run()).divergence(range(4)).max() < 1e-6
    assert sum(sizes) == 4


def test_models_in_memory_are_compared_without_a_cache(dense: Bundle, cache: Path) -> None:
    model = dense.live().eval()
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(0.5)
    bundles = [Bundle(one, dense.tokenizer) for one in (model, other)]
    assert Pool(RECORDS, *bundles, CONFIG, Run()).divergence([0]).min() > 0
    assert not cache.exists()


def test_what_does_not_fit_is_shortened(dense: Bundle) -> None:
    run = Run()
    pool = Pool([Record((("user", "p" * 400),), "r" * 400)], dense, None, SelectConfig(device="cpu"), run)
    assert pool.lengths.tolist() == [dense.max_seqlen]
    assert "at most 256 tokens" in run.warnings[0]
    assert Pool(RECORDS, dense, None, SelectConfig(device="cpu", max_tokens=20), Run()).lengths.max() == 20


def test_mismatched_models_are_one_line(dense: Bundle, llama: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match="257 tokens and the student 64"):
        Pool(RECORDS, dense, Bundle(llama), CONFIG, Run())
    with pytest.raises(FormatError, match="no tokenizer"):
        Pool(RECORDS, Bundle(llama), None, CONFIG, Run())
    with pytest.raises(RecipeError, match="give the pruned one as student"):
        Pool(RECORDS, dense, None, CONFIG, Run()).divergence([0])
    other = AutoTokenizer.from_pretrained(TINY)
    other.add_tokens(["another"])
    with pytest.raises(RecipeError, match="different tokenizers"):
        Pool(RECORDS, dense, Bundle(dense.model, other), CONFIG, Run())


def test_a_broken_model_is_one_line(dense: Bundle, build_model: Callable[..., PreTrainedModel]) -> None:
    broken = dense.live()
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="3 of 3 responses are not finite"):
        Pool(RECORDS, dense, Bundle(broken, dense.tokenizer), CONFIG, Run()).divergence([0, 1, 2])
