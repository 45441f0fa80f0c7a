import math

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from compressllm.core.errors import CalibrationError
from compressllm.eval import perplexity as module
from compressllm.eval.perplexity import perplexity

VOCABULARY, SEQLEN = 97, 13
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def make(config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # logits far from uniform
    return model


@pytest.fixture(scope="module")
def model():
    return make(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def windows():
    return torch.randint(VOCABULARY, (7, SEQLEN), generator=torch.Generator().manual_seed(0))


def slow(model, windows):
    """The protocol word for word: one window at a time, one target at a time, in float64 from the logits on."""
    means = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        total = 0.0
        for place in range(len(window) - 1):
            row = logits[place]
            total += math.log(row.exp().sum()) - float(row[window[place + 1]])
        means.append(total / (len(window) - 1))
    return math.exp(sum(means) / len(means)), means


def test_is_the_protocol(model, windows):
    value, means = slow(model, windows)
    result = perplexity(model, windows)
    assert result.perplexity == pytest.approx(value, rel=1e-5)
    assert result.window_nll == pytest.approx(means, rel=1e-5)
    assert result.nll == pytest.approx(sum(means) / 7, rel=1e-5)
    assert (result.tokens, result.windows, result.seqlen, result.dtype) == (7 * 12, 7, 13, "float32")
    assert result.protocol == (
        "exp of the mean over 7 windows of the mean float32 cross entropy over 12 targets, "
        "each window on its own, model in float32"
    )


def test_uses_the_models_own_head(windows):
    """Gemma 2 caps its logits after the head: a loss from hidden states and the head alone would be wrong."""
    model = make(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0))
    assert perplexity(model, windows).perplexity == pytest.approx(slow(model, windows)[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_batch_nor_chunk_matters(model, windows, dtype, monkeypatch):
    model = make(LlamaConfig(**SIZES)).to(dtype)
    one = perplexity(model, windows, batch_tokens=1)
    assert one.dtype == str(dtype).removeprefix("torch.")
    for chunk in (1, 5 * VOCABULARY, 1 << 30):
        monkeypatch.setattr(module, "_CHUNK_LOGITS_CPU", chunk)
        for batch_tokens in (3 * SEQLEN, 100 * SEQLEN):
            other = perplexity(model, windows, batch_tokens=batch_tokens)
            assert other.window_nll == pytest.approx(one.window_nll, rel=1e-6 if dtype == torch.float32 else 1e-2)


def test_is_the_same_every_time(model, windows):
    assert perplexity(model, windows) == perplexity(model, windows)


def test_bfloat16_logits_are_scored_in_float32(windows):
    model = make(LlamaConfig(**SIZES)).to(torch.bfloat16)
    assert perplexity(model, windows, batch_tokens=1).window_nll == pytest.approx(slow(model, windows)[1], rel=1e-6)


def test_dropout_is_off_and_the_mode_kept(windows):
    model = make(LlamaConfig(**SIZES, attention_dropout=0.5))
    expected = perplexity(model, windows)
    model.train()
    assert perplexity(model, windows) == expected
    assert model.training
    assert model.model.layers[0].self_attn.q_proj.weight.requires_grad


def test_shows_progress_batch_by_batch(model, windows):
    seen = []

    def track(items, total, label):
        for item in items:
            seen.append((len(item), total, label))
            yield item

    perplexity(model, windows, batch_tokens=3 * SEQLEN, progress=track)
    assert seen == [(3, 3, "evaluating"), (3, 3, "evaluating"), (1, 3, "evaluating")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_its_window_and_where_it_began(windows, bad):
    model = make(LlamaConfig(**SIZES))
    model.train()
    windows = windows.clamp(max=VOCABULARY - 2)
    windows[4, 6] = VOCABULARY - 1  # only this window meets the ruined embedding
    model.model.embed_tokens.weight.data[VOCABULARY - 1] = bad
    with pytest.raises(CalibrationError, match=r"window 4 of 7: loss is nan, first in the output of model\.embed_"):
        perplexity(model, windows)
    assert model.training


def test_batches_are_halved_where_memory_does_not_do(model, windows, monkeypatch):
    expected, tried, said = perplexity(model, windows, batch_tokens=SEQLEN), [], []
    measure = module._window_losses

    def scarce(model, ids):
        tried.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(model, ids)

    monkeypatch.setattr(module, "_window_losses", scarce)
    assert perplexity(model, windows, batch_tokens=4 * SEQLEN, warn=said.append) == expected
    assert tried == [4, 2, *[1] * 7]
    assert said == [f"out of memory with {n} windows at once; going on with {n // 2}" for n in (4, 2)]
    monkeypatch.setattr(module, "_window_losses", lambda model, ids: scarce(model, torch.cat([ids, ids])))
    with pytest.raises(torch.OutOfMemoryError):
        perplexity(model, windows)


def test_hopeless_models_have_infinite_perplexity(windows):
    model = make(LlamaConfig(**SIZES))
    model.lm_head.weight.data.mul_(1e5)
    result = perplexity(model, windows)
    assert result.perplexity == math.inf
    assert 700 < result.nll < math.inf


@pytest.mark.parametrize("shape", [(3,), (0, 4), (3, 1), (2, 3, 4)])
def test_windows_of_the_wrong_shape(model, shape):
    with pytest.raises(CalibrationError, match="got windows of shape"):
        perplexity(model, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary(model, token):
    with pytest.raises(CalibrationError, match=r"token ids run from .* the model's vocabulary has 97; were they made"):
        perplexity(model, torch.tensor([[0, token, 1]]))
