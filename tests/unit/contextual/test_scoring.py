"""One pass over a text against drafting it token by token; densities and periods against the papers' tables."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.contextual.attach import Contextual
from compressllm.contextual.calibrate import calibrate
from compressllm.contextual.coarse import PromptMlp
from compressllm.contextual.control import Mode
from compressllm.contextual.decode import Decoding
from compressllm.contextual.density import (
    effective_density,
    expected_advance,
    param_density,
    read_density,
    suggest_period,
)
from compressllm.contextual.fine import TokenMlp
from compressllm.contextual.probes import PROBES, is_right, make_items
from compressllm.contextual.runner import Runner
from compressllm.contextual.scoring import decode_logits, score_windows
from compressllm.contextual.sirius import Sirius
from compressllm.core.errors import RecipeError
from compressllm.core.protocols import NEURON_SELECTORS

Attach = Callable[..., Contextual]


@pytest.mark.parametrize("selector", NEURON_SELECTORS.names())
def test_one_pass_predicts_what_drafting_does(selector: str, attached: Attach, windows: Tensor) -> None:
    contextual, window = attached(selector, 0.4), windows[0]
    together = decode_logits(contextual, window, prompt=6)
    decoding = Decoding(contextual, window[None, :6], 20)
    with torch.inference_mode():
        decoding._start()
        decoding.cache.rewind(decoding.cache.length - 6)
        for at in range(6, len(window)):
            torch.testing.assert_close(decoding._draft(int(window[at]))[0], together[at], rtol=0, atol=1e-10)
    scored = score_windows(contextual, windows[:2], 6, Sirius())
    assert scored.tokens == 2 * (16 - 6 - 1)
    assert scored.sparse_nll != scored.dense_nll
    assert scored.stands is not None
    assert scored.agreement <= scored.stands <= 1
    assert scored.divergence > 0


def test_all_neurons_score_as_the_dense_model(attached: Attach, windows: Tensor) -> None:
    scored = score_windows(attached("griffin", 1.0), windows[:2], 6)
    assert scored.agreement == 1
    assert scored.divergence == pytest.approx(0, abs=1e-12)
    assert scored.sparse_nll == pytest.approx(scored.dense_nll, rel=1e-12)


@pytest.mark.parametrize("selector", NEURON_SELECTORS.names())
def test_blocks_at_both_ends_may_stay_dense(selector: str, model: PreTrainedModel, windows: Tensor) -> None:
    """With the others' MLPs left as they are, only the middle block's neurons change anything."""
    fitted = calibrate(model, selector, windows)
    contextual = Contextual(model, selector, 0.4, fitted, skip_first=1, skip_last=1)
    score_windows(contextual, windows[:1], 6)
    assert all(one.planned() == 1 for one in contextual.runners if "layers.1" not in name_of(one))
    assert any(one.planned() < 1 for one in contextual.runners)
    contextual.detach_()
    with pytest.raises(RecipeError, match="leave none of 3"):
        Contextual(model, selector, 0.4, fitted, skip_first=2, skip_last=1)


def name_of(runner: Runner) -> str:
    """Path of what it stands for; of a linear, any in the middle block."""
    return runner.mlp.name if isinstance(runner, PromptMlp | TokenMlp) else "layers.1"


def test_densities_count_what_is_read(attached: Attach, model: PreTrainedModel, prompt: Tensor) -> None:
    """Of a model with MLPs of 3 * 48 * 32 weights in three blocks, attention of 2 * 32 * 32 + 2 * 32 * 16, a head."""
    mlps, rest = 3 * 3 * 48 * 32, 3 * (2 * 32 * 32 + 2 * 32 * 16) + 64 * 32
    contextual = attached("griffin", 2 / 3)
    assert read_density(contextual, planned=True) == pytest.approx((2 / 3 * mlps + rest) / (mlps + rest))
    everything = sum(p.numel() for p in model.parameters())
    assert param_density(contextual) == pytest.approx(1 - mlps / 3 / everything)
    contextual.detach_()
    gated = attached({"topk": {"by": "gate"}}, 0.5)
    list(Decoding(gated, prompt, 5).spans())
    half = (1 / 3 + 2 / 3 / 2) * mlps
    assert read_density(gated) == pytest.approx((half + rest) / (mlps + rest))
    with gated.control.set(Mode.CHECK):
        before = read_density(gated)
        model(input_ids=prompt)
        assert read_density(gated) == before, "what is not drafted is not counted"


@pytest.mark.parametrize(
    ("advance", "density", "published"),
    [(15.22, 0.65, 0.706), (15.37, 0.76, 0.807), (14.76, 0.58, 0.657), (14.67, 0.65, 0.733), (15.54, 0.76, 0.797)],
)
def test_effective_density_is_as_published(advance: float, density: float, published: float) -> None:
    """Rows of Sirius's table at period 16, whose densities are rounded to two digits."""
    assert effective_density(16, density, advance) == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(("rate", "cost"), [(0.89, 0.84), (0.95, 0.77), (0.99, 0.69)])
def test_the_period_suggested_is_the_cheapest(rate: float, cost: float) -> None:
    """Costs at a sparse step of 0.62, by a table of all periods made in the test."""
    costs = {}
    for period in range(1, 33):
        advance = sum(rate**at for at in range(period))  # of at most so many tokens, each standing if those before do
        costs[period] = ((period - 1) * 0.62 + 1) / advance
    chosen = suggest_period(rate, 0.62)
    assert costs[chosen] == min(costs.values())
    assert round(costs[chosen], 2) == cost
    assert expected_advance(rate, chosen) == pytest.approx(sum(rate**at for at in range(chosen)))


def test_no_draft_is_suggested_where_none_pays() -> None:
    assert suggest_period(0.3, 0.9) == 1
    dear = suggest_period(0.99, 0.62, lambda period: 1 + 0.3 * (period - 1))
    assert dear < suggest_period(0.99, 0.62), "checks that cost more read less at a time"
    assert expected_advance(1.0, 8) == 8


def test_probes_are_the_same_for_a_seed_and_answer_themselves() -> None:
    items = make_items(4)
    assert items == make_items(4) != make_items(4, seed=1)
    assert {item.probe for item in items} == set(PROBES)
    assert len(items) == 4 * len(PROBES)
    for item in items:
        wrong = f" {item.answer}x\nmore"
        assert is_right(item, f" {item.answer}\nmore")
        assert not is_right(item, wrong)
        assert not is_right(item, "")
    worked = next(item for item in items if item.probe == "word problem")
    assert is_right(worked, f" 3 + 4 = 7, 7 - 2 = {worked.answer}\nQ:")
