"""A Llama's step in C against the model's own forward."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    StaticCache,
)

from compressllm.core.gathered import Gathered
from compressllm.core.pattern import NM
from compressllm.eval.decoding import Decoder
from compressllm.kernels.native.llama import LlamaStep, llama_step, refuses
from compressllm.kernels.swapper import Swapper, swap_linears_

SHAPE = {
    "vocab_size": 70,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTARY = {"rope_theta": 10000.0, "original_max_position_embeddings": 16} | SCALED
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True),
    "scaled": lambda: LlamaConfig(**SHAPE, rope_parameters=ROTARY),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
}


def model_of(config, dtype=torch.float32, backend="native", bits=None, head=False, dense=(), gathered=False):
    """Random weights that bfloat16 holds, 2:4, gathered or not, in all linears but those named in ``dense``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data = (torch.randn_like(p) / p.shape[-1] ** 0.5 + (p.dim() == 1)).bfloat16().to(dtype)
    masks, patterns = {}, {}
    for name, module in model.named_modules():
        kept = isinstance(module, torch.nn.Linear) and not name.endswith(dense or "?")
        if kept and (head or name != "lm_head"):
            order = torch.randperm(module.in_features)
            patterns[name] = Gathered.of(NM(2, 4), order) if gathered else NM(2, 4)
            masks[name] = patterns[name].keep(module.weight.abs())
            module.weight.data *= masks[name]
    swap_linears_(model, Swapper(masks, patterns, backend, bits=bits, group=32))
    return model


def logits_of(model, ids, prompt, native=None):
    """What comes after each of the tokens behind the prompt, and how it was found."""
    decoder = Decoder(model, length=ids.shape[1], native=native)
    found = [decoder.prefill(ids[:, :prompt])]
    found += [decoder.step(ids[:, at : at + 1]) for at in range(prompt, ids.shape[1])]
    return torch.stack(found), decoder.kind


@pytest.mark.parametrize(("backend", "bits"), [("native", None), ("native-exact", 8), ("native-exact", 4)])
@pytest.mark.parametrize("name", CONFIGS)
def test_computes_what_the_model_does(name, backend, bits):
    model = model_of(CONFIGS[name](), backend=backend, bits=bits)
    ids = torch.randint(70, (1, 21), generator=torch.Generator().manual_seed(1))
    expected, kind = logits_of(model, ids, 5)
    assert kind == "transformers"
    got, kind = logits_of(model, ids, 5, llama_step)
    assert kind == "native"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_gathers_inputs():
    ids = torch.randint(70, (1, 21), generator=torch.Generator().manual_seed(1))
    model = model_of(CONFIGS["biases"](), gathered=True)
    assert model.model.layers[0].mlp.down_proj.order is not None
    expected, _ = logits_of(model, ids, 5)
    got, kind = logits_of(model, ids, 5, llama_step)
    assert kind == "native"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_is_closer_to_exact_than_the_model_in_bfloat16():
    ids = torch.randint(70, (1, 21), generator=torch.Generator().manual_seed(1))
    exact, _ = logits_of(model_of(LlamaConfig(**SHAPE)), ids, 5)
    half = model_of(LlamaConfig(**SHAPE), torch.bfloat16, head=True)
    theirs, _ = logits_of(half, ids, 5)
    ours, kind = logits_of(half, ids, 5, llama_step)
    assert kind == "native"
    assert ours.dtype == torch.bfloat16
    exact, _ = logits_of(model_of(LlamaConfig(**SHAPE), head=True), ids, 5)
    assert (ours - exact)[1:].norm() <= (theirs - exact)[1:].norm()


def test_begins_anew_with_each_prompt():
    model = model_of(LlamaConfig(**SHAPE))
    decoder, ids = Decoder(model, length=12, native=llama_step), torch.arange(12).unsqueeze(0)

    def run():
        return torch.stack([decoder.prefill(ids[:, :5]), *(decoder.step(ids[:, at : at + 1]) for at in range(5, 12))])

    assert torch.equal(run(), run())
    with pytest.raises(IndexError, match="position 12 of a cache for 12"):
        decoder.step(ids[:, :1])


def test_several_sequences_are_left_to_the_model():
    decoder = Decoder(model_of(LlamaConfig(**SHAPE)), length=12, native=llama_step)
    decoder.prefill(torch.arange(10).view(2, 5))
    assert decoder.kind == "transformers"
    assert decoder.step(torch.tensor([[1], [2]])).shape == (2, 70)


def hooked():
    model = model_of(LlamaConfig(**SHAPE))
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def replaced():
    model = model_of(LlamaConfig(**SHAPE))
    model.model.layers[1].mlp = torch.nn.Identity()
    return model


REFUSED = {
    "slides a window": lambda: model_of(MistralConfig(**SHAPE, sliding_window=8)),
    "not for gemma3_text": lambda: model_of(Gemma3TextConfig(**SHAPE)),
    "not for gelu": lambda: model_of(LlamaConfig(**SHAPE, hidden_act="gelu")),
    "0.mlp.down_proj is dense": lambda: model_of(LlamaConfig(**SHAPE), dense=("down_proj",)),
    "runs on reference": lambda: model_of(LlamaConfig(**SHAPE), backend="reference"),
    "has hooks": hooked,
    "was replaced by a Identity": replaced,
    "not for dynamic": lambda: model_of(
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(reason):
    model = REFUSED[reason]()
    assert reason in refuses(model)
    cache = StaticCache(config=model.config, max_cache_len=8)
    if reason != "was replaced by a Identity":
        model(torch.arange(3).unsqueeze(0), past_key_values=cache)
        assert llama_step(model, cache) is None


def test_the_number_of_threads_changes_no_bit():
    model, before = model_of(LlamaConfig(**SHAPE)), torch.get_num_threads()
    keys = [torch.randn(1, 2, 9, 8) for _ in range(3)]
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            step = LlamaStep(model, [one.clone() for one in keys], [one.clone() for one in keys])
            results.append(step(torch.tensor([[3]]), 7))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)
