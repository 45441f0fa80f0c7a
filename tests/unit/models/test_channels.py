from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import BitNetConfig, FalconConfig, LlamaConfig, OPTConfig, Phi3Config, PreTrainedModel

from compressllm.core.difference import relative_difference
from compressllm.core.pattern import NM
from compressllm.models.blocks import all_linears
from compressllm.models.channels import Channels, Scope, Slot, find_channels
from compressllm.prune.fold import Folds, sets_of

SCOPES: list[tuple[Scope, ...]] = [("mlp",), ("attention",), ("residual",), ("mlp", "attention", "residual")]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_folds(channels: list[Channels]) -> Folds:
    generator = torch.Generator().manual_seed(0)
    return Folds(
        channels, {one.name: torch.rand(one.sets, one.size, generator=generator).argsort(dim=1) for one in channels}
    )


def change_(model: PreTrainedModel, change: Callable[[str, Tensor], Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = change(name, parameter.data)


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    return model(windows).logits


def hold_same(model: PreTrainedModel, scope: tuple[Scope, ...], windows: Tensor) -> None:
    """Random orders of all channels change weights, but not what the model computes; and they can be undone."""
    found = find_channels(model, scope, NM(2, 4))
    assert not any(found.left.values())
    assert {one.scope for one in found.channels} == set(scope)
    folds = random_folds(found.channels)
    before, weights = logits(model, windows), {name: value.clone() for name, value in model.state_dict().items()}
    change_(model, folds.apply)
    assert folds.tensors >= {
        name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])
    }
    for one in found.channels:
        assert not torch.equal(model.get_parameter(one.readers[0].tensor), weights[one.readers[0].tensor])
    assert relative_difference(logits(model, windows), before) <= 1e-5
    change_(model, folds.undo)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
def test_orders_do_not_change_what_is_computed(
    decoder: PreTrainedModel, windows: Tensor, scope: tuple[Scope, ...]
) -> None:
    if any(linear.form for linear in all_linears(decoder).values()):
        pytest.skip("transposed linears and experts are not reordered")
    hold_same(decoder, scope, windows)


@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
def test_fused_matrices(build_model: Callable, windows: Tensor, scope: tuple[Scope, ...]) -> None:
    hold_same(build_model(Phi3Config(**SHAPE)), scope, windows)


def test_tied_head_follows_the_embedding(build_model: Callable, windows: Tensor) -> None:
    hold_same(build_model(LlamaConfig(**SHAPE, tie_word_embeddings=True)), ("residual",), windows)


def test_what_is_in_the_way_is_named(build_model: Callable) -> None:
    # Norms between up and down, and between value and output, weigh each channel by a weight of its own.
    found = find_channels(build_model(BitNetConfig(**SHAPE)), ("mlp", "attention", "residual"), NM(2, 4))
    assert not found.channels
    assert "ffn_sub_norm.weight" in found.left["mlp"][0]
    assert "attn_sub_norm.weight" in found.left["attention"][0]
    assert "sub_norm.weight" in found.left["residual"][0]


def test_value_rows_of_unknown_place_are_left_alone(build_model: Callable, windows: Tensor) -> None:
    model = build_model(FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    found = find_channels(model, ("mlp", "attention"), NM(2, 4))
    assert {one.scope for one in found.channels} == {"mlp"}
    assert "query_key_value has 48 rows, 96 are expected" in found.left["attention"][0]
    hold_same(model, ("mlp", "residual"), windows)


def test_a_projected_embedding_keeps_the_residual_stream_as_it_is(build_model: Callable) -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    )
    found = find_channels(build_model(config), ("residual",), NM(2, 4))
    assert not found.channels
    assert "has no known part in it" in found.left["residual"][0]


def test_sets_that_groups_do_not_fit_into(build_model: Callable) -> None:
    model = build_model(LlamaConfig(**SHAPE | {"intermediate_size": 40}))
    found = find_channels(model, ("mlp", "attention", "residual"), NM(8, 16))
    assert [one.scope for one in found.channels] == ["residual"]
    assert "40 channels are no multiple of 16" in found.left["mlp"][0]
    assert "8 channels are no multiple of 16" in found.left["attention"][0]


def test_a_reader_has_all_its_rows_in_every_set_it_repeats() -> None:
    scores = torch.arange(48.0).view(4, 12)  # two sets of three channels, each twice
    sets = sets_of(Slot("o", 1, repeat=2), scores, sets=2, size=3)
    assert sets.shape == (2, 8, 3)
    for one, columns in enumerate((range(0, 6), range(6, 12))):
        expected = {tuple(scores[row, columns[k * 3 : k * 3 + 3]].tolist()) for row in range(4) for k in range(2)}
        assert {tuple(row) for row in sets[one].tolist()} == expected
