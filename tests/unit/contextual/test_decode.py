"""The decoding loop: what comes out, what the cache holds, what is counted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from compressllm.contextual.attach import Contextual
from compressllm.contextual.control import Mode
from compressllm.contextual.decode import Decoding
from compressllm.contextual.density import effective_density, measured_density
from compressllm.contextual.sampling import Sampler, accept_drawn
from compressllm.contextual.sirius import Sirius
from compressllm.contextual.tree import grow_tree
from compressllm.core.errors import CompressError, RecipeError, UnsupportedModelError
from compressllm.core.protocols import NEURON_SELECTORS

EXACT = [Sirius(5, 0.51, rule="likely"), Sirius(3, 1.5), Sirius(8, rule="exact"), Sirius(4, 0.6, width=3)]

UNSUPPORTED = {"gpt2": "no such MLP", "mixtral": "mixture", "qwen2_moe": "mixture", "qwen3_moe": "mixture"}
DenseText = Callable[[PreTrainedModel, Tensor, int], list[int]]
Attach = Callable[..., Contextual]


def text_of(decoding: Decoding) -> list[int]:
    """All that it adds."""
    return [token for span in decoding.spans() for token in span]


@pytest.mark.parametrize("selector", NEURON_SELECTORS.names())
def test_a_threshold_above_one_half_gives_the_dense_text(
    selector: str, attached: Attach, model: PreTrainedModel, prompt: Tensor, dense_text: DenseText
) -> None:
    right = dense_text(model, prompt, 17)
    contextual = attached(selector, 0.3)
    assert text_of(Decoding(contextual, prompt, 17)) != right, "drafts are right without correction: shows nothing"
    for corrector in EXACT:
        assert text_of(Decoding(contextual, prompt, 17, corrector)) == right, corrector


@pytest.mark.parametrize("selector", NEURON_SELECTORS.names())
def test_all_neurons_are_the_dense_model(
    selector: str, attached: Attach, model: PreTrainedModel, prompt: Tensor, dense_text: DenseText
) -> None:
    right = dense_text(model, prompt, 12)
    contextual = attached(selector, 1.0)
    assert text_of(Decoding(contextual, prompt, 12)) == right
    decoding = Decoding(contextual, prompt, 12, Sirius(period=4, threshold=1.5))
    assert text_of(decoding) == right
    assert decoding.counts.advances[:-1] == [4, 4], "the dense model's own choices stand"


def test_every_architecture(
    decoder: PreTrainedModel, ready: Callable[..., PreTrainedModel], prompt: Tensor, dense_text: DenseText
) -> None:
    """With sliding windows of 5 tokens, shorter than the prompt, among them; with biases and without a gate."""
    model = ready(decoder)
    if model.config.model_type in UNSUPPORTED:
        with pytest.raises(UnsupportedModelError, match=UNSUPPORTED[model.config.model_type]):
            Contextual(model)
        return
    right = dense_text(model, prompt, 9)
    for selector in ("griffin", "topk"):
        contextual = Contextual(model, selector, 0.2)
        assert text_of(Decoding(contextual, prompt, 9, Sirius(4, 0.6))) == right
        decoding = Decoding(contextual, prompt, 9)
        assert len(text_of(decoding)) == decoding.counts.drafts + 1 == 9
        with torch.inference_mode(), contextual.control.set(Mode.DRAFT):
            drafted = model(input_ids=prompt).logits
        assert (drafted - model(input_ids=prompt).logits).abs().max() > 1e-3
        contextual.detach_()
    assert dense_text(model, prompt, 9) == right


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(**SMALL, intermediate_size=48),  # gate and up are one weight
        OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False),
        LlamaConfig(**SMALL, intermediate_size=48, mlp_bias=True, attn_implementation="eager"),
    ],
    ids=lambda config: config.model_type,
)
def test_fused_gates_norms_behind_biases_and_eager_attention(
    config: PreTrainedConfig,
    build_model: Callable[..., PreTrainedModel],
    ready: Callable,
    prompt: Tensor,
    dense_text: DenseText,
) -> None:
    model = ready(build_model(config))
    right = dense_text(model, prompt, 9)
    for selector in ("griffin", {"topk": {"by": "gate"}}):
        contextual = Contextual(model, selector, 0.3)
        for corrector in (Sirius(4, 0.6), Sirius(4, 0.6, width=2)):
            assert text_of(Decoding(contextual, prompt, 9, corrector)) == right
        contextual.detach_()


def test_no_more_rows_are_taken_back_than_there_are(attached: Attach, prompt: Tensor) -> None:
    decoding = Decoding(attached("griffin"), prompt, 3)
    text_of(decoding)
    with pytest.raises(ValueError, match="12 of 11 rows"):
        decoding.cache.rewind(12)


@pytest.mark.parametrize("corrector", [Sirius(5, 0.0), Sirius(5, 0.02), Sirius(4, 0.02, width=3)], ids=str)
def test_the_cache_holds_the_dense_rows_of_what_was_given_out(
    corrector: Sirius, attached: Attach, model: PreTrainedModel, prompt: Tensor
) -> None:
    contextual = attached("griffin", 0.3)
    decoding = Decoding(contextual, prompt, 14, corrector)
    for _ in decoding.spans():
        tokens = torch.tensor([decoding.tokens[:-1]])
        dense = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=tokens, past_key_values=dense)
        assert decoding.cache.length == tokens.shape[1]
        for mine, right in zip(decoding.cache.layers, dense.layers, strict=True):
            for held, wanted in ((mine.keys, right.keys), (mine.values, right.values)):
                torch.testing.assert_close(held[..., : tokens.shape[1], :], wanted, rtol=0, atol=1e-12)


def test_counts_add_up(attached: Attach, prompt: Tensor) -> None:
    for corrector in (Sirius(4, 0.02), Sirius(4, 0.0)):
        decoding = Decoding(attached("griffin", 0.3), prompt, 18, corrector)
        assert len(text_of(decoding)) == 18
        counts = decoding.counts
        assert 1 + sum(counts.advances) == counts.tokens == 18
        assert all(1 <= one <= 4 for one in counts.advances)
        assert counts.checked == counts.drafts + counts.checks
        if corrector.threshold == 0:
            assert counts.advances[:-1] == [4] * (len(counts.advances) - 1), "nothing is ever cut"
            whole = effective_density(4, 0.7, 4)
            assert measured_density(counts, 0.7) == pytest.approx(whole, abs=0.1)
    plain = Decoding(attached("griffin", 0.3), prompt, 6)
    text_of(plain)
    assert plain.counts.drafts == 5
    assert measured_density(plain.counts, 0.7) == pytest.approx(0.7)


def test_a_tree_of_one_is_a_chain_and_a_wider_one_gets_no_less_far(attached: Attach, prompt: Tensor) -> None:
    contextual, threshold = attached("griffin", 0.3), 0.02
    chain = Decoding(contextual, prompt, 14, Sirius(5, threshold))
    text_of(chain)
    single = Decoding(contextual, prompt, 14, Sirius(5, threshold))
    with torch.inference_mode():
        single._start()
        while not single.done:
            room = min(5, single._end - len(single.tokens))
            corrector = Sirius(5, threshold)
            new = grow_tree(single, corrector, room) if room > 1 else single._cycle(corrector, room)
            single.counts.advances.append(len(new))
            single._emit(new)
    assert single.tokens == chain.tokens
    assert single.counts.advances == chain.counts.advances
    wide = Decoding(contextual, prompt, 14, Sirius(5, threshold, width=4))
    text_of(wide)
    assert wide.counts.advances[0] >= chain.counts.advances[0]


def test_ends_inside_a_draft(attached: Attach, model: PreTrainedModel, prompt: Tensor, dense_text: DenseText) -> None:
    """Whatever token of the dense text is the end, and wherever in a span it comes, the text stops with it."""
    right = dense_text(model, prompt, 16)
    contextual, never = attached("griffin", 0.9), next(token for token in range(64) if token not in right)
    for end in sorted(set(right)):
        for corrector in (Sirius(5, 0.6), Sirius(4, 0.6, width=2)):
            decoding = Decoding(contextual, prompt, 16, corrector, ends={end, never})
            assert text_of(decoding) == right[: right.index(end) + 1]
            assert decoding.cache.length == len(decoding.tokens) - 1


def test_an_end_that_is_only_likely_is_not_taken(attached: Attach, prompt: Tensor) -> None:
    """With a threshold of 0 every drafted token stands, but an end only if the dense model's best."""
    contextual = attached("griffin", 0.3)
    free = text_of(Decoding(contextual, prompt, 16, Sirius(5, 0.0)))
    checked = 0
    for end in sorted(set(free)):
        decoding = Decoding(contextual, prompt, 16, Sirius(5, 0.0), ends={end})
        made = text_of(decoding)
        if made[-1] == end:
            before = torch.tensor([decoding.tokens[:-1]])
            with torch.inference_mode(), contextual.control.set(Mode.CHECK):
                assert int(contextual.model(input_ids=before).logits[0, -1].argmax()) == end
            checked += 1
    assert checked


@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_prompts_of_one_token_and_limits_inside_a_span(
    limit: int, attached: Attach, model: PreTrainedModel, dense_text: DenseText
) -> None:
    one = torch.tensor([[7]])
    right = dense_text(model, one, limit)
    contextual = attached("griffin", 0.5)
    for corrector in (Sirius(4, 0.6), Sirius(4, 0.6, width=2)):
        decoding = Decoding(contextual, one, limit, corrector)
        assert text_of(decoding) == right
        assert decoding.cache.length == limit


def test_what_is_refused(
    attached: Attach, model: PreTrainedModel, prompt: Tensor, build_model: Callable[..., PreTrainedModel]
) -> None:
    contextual = attached("griffin")
    for wrong, ids, sampler, corrector in (
        ("one prompt at a time", prompt.repeat(2, 1), None, None),
        ("prompt of 0 tokens", prompt[:, :0], None, None),
        ("greedy", prompt, Sampler(drawn=True), Sirius(width=2)),
    ):
        with pytest.raises(CompressError, match=wrong):
            Decoding(contextual, ids, 4, corrector, sampler)
    contextual.detach_()
    sliding = Contextual(build_model(MistralConfig(**model.config.to_dict() | {"sliding_window": 5})))
    with pytest.raises(UnsupportedModelError, match="slides"):
        Decoding(sliding, prompt, 4, Sirius(width=2))
    with pytest.raises(RecipeError, match=r"density 1\.5"):
        Contextual(model, density=1.5)
    with pytest.raises(RecipeError, match="look at text first"):
        Contextual(model, "cats")


def test_drawn_tokens_are_distributed_as_the_dense_models() -> None:
    torch.manual_seed(0)
    dense = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])
    drafter = torch.tensor([0.1, 0.6, 0.1, 0.2])
    seen = torch.zeros(4)
    for _ in range(4000):
        drafted = int(torch.multinomial(drafter, 1))
        stand, following = accept_drawn([drafted], [drafter], dense)
        seen[drafted if stand else following] += 1
    torch.testing.assert_close(seen / 4000, dense[0], rtol=0, atol=4 * (0.25 / 4000) ** 0.5)


def test_sampling_exactly_is_seeded_and_never_leaves_the_processors_choice(attached: Attach, prompt: Tensor) -> None:
    def no_even(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(64) % 2 == 0, -torch.inf)

    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampler = Sampler(drawn=True, temperature=2.0, processors=no_even)
        made.append(text_of(Decoding(attached("griffin", 0.3), prompt, 12, Sirius(4, rule="exact"), sampler)))
    assert made[0] == made[1] != made[2]
    assert all(token % 2 for tokens in made for token in tokens)
