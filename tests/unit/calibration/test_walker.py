import copy
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.calibration.experts import eager_experts
from compressllm.calibration.inputs import hidden_states
from compressllm.calibration.walker import WalkOptions, walk_blocks
from compressllm.core.errors import CalibrationError, UnsupportedModelError
from compressllm.core.stats import InputStats
from compressllm.models.blocks import all_linears, find_blocks
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model, skeleton
from compressllm.models.shards import ShardWriter
from compressllm.models.weights import LiveWeights, StreamedWeights

NEEDS = frozenset({"mean", "sqnorm"})
RAGGED = WalkOptions(batch_tokens=48)  # 7 windows of 16 tokens go as 3, 3 and 1

Stats = dict[str, InputStats]


@contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Every module's first input, call by call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name].append((args[0] if args else kwargs["hidden_states"]).clone())

        return note

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def plain_forward(model: PreTrainedModel, windows: Tensor, modules: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """What every module sees while the whole model runs, in the batches of a `RAGGED` walk."""
    with recording(modules) as seen, torch.inference_mode(), eager_experts(model):
        for batch in windows.split(3):
            model(batch, use_cache=False)
    return seen


def collect(model: PreTrainedModel, windows: Tensor, options: WalkOptions = RAGGED, start: int = 0) -> Stats:
    stats: Stats = {}
    for block in walk_blocks(model, windows, LiveWeights(model), options, start):
        stats |= block.collect(NEEDS)
    return stats


class Streamed(NamedTuple):
    model: PreTrainedModel
    weights: StreamedWeights
    out: ShardWriter


def streamed(folder: Path, into: Path, dtype: torch.dtype, finished: Iterable[str] = ()) -> Streamed:
    source = Checkpoint(folder)
    model = skeleton(source)
    into.mkdir(exist_ok=True)
    out = ShardWriter(into, source.specs)
    return Streamed(model, StreamedWeights(model, source, out, set(finished), dtype, torch.device("cpu")), out)


def assert_same_stats(found: Stats, expected: Stats) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, stats in found.items():
        assert stats.tokens == expected[name].tokens
        assert torch.equal(stats.need("sqnorm"), expected[name].need("sqnorm")), name
        assert torch.equal(stats.need("mean"), expected[name].need("mean")), name


def test_an_unchanged_walk_is_a_plain_forward(decoder: PreTrainedModel, windows: Tensor) -> None:
    blocks, linears = find_blocks(decoder), all_linears(decoder)
    modules: dict[str, nn.Module] = {blocks.name(index): module for index, module in enumerate(blocks.modules)}
    alone = {name: one.module for name, one in linears.items() if one.expert is None}
    expected = plain_forward(decoder, windows, modules | alone)
    stats: Stats = {}
    for block in walk_blocks(decoder, windows, LiveWeights(decoder), RAGGED):
        assert list(block.linears) == [name for name in linears if name.startswith(f"{block.name}.")]
        with recording({block.name: block.module}) as seen:
            stats |= block.collect(NEEDS)
        assert len(seen[block.name]) == 3
        for walked, plain in zip(seen[block.name], expected[block.name], strict=True):
            assert torch.equal(walked, plain)  # hidden states bit for bit
    assert stats.keys() == linears.keys()
    for name in alone:
        one = stats[name]
        x = torch.cat([batch.flatten(0, -2) for batch in expected[name]]).double()
        assert one.tokens == len(x) == windows.numel()
        torch.testing.assert_close(one.need("sqnorm").double(), x.square().mean(0), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.need("mean").double(), x.mean(0), rtol=1e-5, atol=1e-6)


def test_each_block_sees_what_changed_blocks_put_out(decoder: PreTrainedModel, windows: Tensor) -> None:
    blocks = find_blocks(decoder)
    for block in walk_blocks(decoder, windows, LiveWeights(decoder), RAGGED):
        with recording({block.name: block.module}) as seen:
            block.collect(NEEDS)
        expected = plain_forward(decoder, windows, {block.name: blocks.modules[block.index]})
        assert all(torch.equal(a, b) for a, b in zip(seen[block.name], expected[block.name], strict=True))
        for linear in block.linears.values():
            linear.weight.data[:, ::2] = 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_weights_walk_as_live_ones_do(
    decoder: PreTrainedModel, windows: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    decoder.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    expected = collect(load_model(tmp_path / "m", dtype), windows)
    model, weights, out = streamed(tmp_path / "m", tmp_path / "out", dtype)
    stats: Stats = {}
    for block in walk_blocks(model, windows, weights, RAGGED):
        stats |= block.collect(NEEDS)
        weights.finish_(block.name)
    weights.finish_rest_()
    assert_same_stats(stats, expected)
    for name in Checkpoint(tmp_path / "m").specs:
        assert torch.equal(out.read(name), Checkpoint(tmp_path / "m").read(name)), name


def test_only_one_block_is_in_memory_at_a_time(tiny_llama_folder: Path, windows: Tensor, tmp_path: Path) -> None:
    model, weights, _ = streamed(tiny_llama_folder, tmp_path / "out", torch.float32)
    for block in walk_blocks(model, windows, weights, RAGGED):
        block.collect(NEEDS)
        real = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
        assert real == {f"{block.name}.{name}" for name, _ in block.module.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_finished_block_is_read_back_as_it_was_written(
    tiny_llama_folder: Path, windows: Tensor, tmp_path: Path
) -> None:
    def walk(folder: Path, finished: set[str], start: int, stop: int) -> Stats:
        model, weights, _ = streamed(tiny_llama_folder, folder, torch.float32, finished)
        stats: Stats = {}
        for block in walk_blocks(model, windows, weights, RAGGED, start):
            if block.index == stop:
                break
            stats |= block.collect(NEEDS)
            for name in block.linears:
                value = weights.read(f"{name}.weight").float() * 0.7  # not a bfloat16 number, so it is rounded
                weights.replace_(f"{name}.weight", value)
            weights.finish_(block.name)
        return stats

    expected = walk(tmp_path / "a", set(), start=0, stop=3)
    first = walk(tmp_path / "b", set(), start=0, stop=2)
    second = walk(tmp_path / "b", {"model.layers.0", "model.layers.1"}, start=2, stop=3)
    assert first.keys() & second.keys() == set()
    assert_same_stats(first | second, expected)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_walk_can_begin_at_any_block(decoder: PreTrainedModel, windows: Tensor, start: int) -> None:
    later = [f"{find_blocks(decoder).name(index)}." for index in range(start, 3)]
    every = collect(decoder, windows)
    expected = {name: one for name, one in every.items() if name.startswith(tuple(later))}
    found = collect(decoder, windows, start=start)
    assert list(found) == list(expected)
    if found:
        assert_same_stats(found, expected)


def test_spilled_activations_change_nothing_and_leave_nothing(
    decoder: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    spilled = collect(decoder, windows, WalkOptions(batch_tokens=48, memory_limit=0, spill_folder=tmp_path))
    assert_same_stats(spilled, collect(decoder, windows))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
def test_batches_in_several_threads_give_the_same_bits(
    decoder: PreTrainedModel, windows: Tensor, memory_limit: int
) -> None:
    options = WalkOptions(batch_tokens=16, memory_limit=memory_limit)  # a batch is one window
    expected = collect(decoder, windows, options)
    torch.set_num_threads(3)
    try:
        assert_same_stats(collect(decoder, windows, options), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("batch_tokens", [1, 32, 48, 10_000])
def test_batches_change_no_more_than_the_last_bits(llama: PreTrainedModel, windows: Tensor, batch_tokens: int) -> None:
    expected = collect(llama, windows, WalkOptions(batch_tokens=10_000))
    for name, one in collect(llama, windows, WalkOptions(batch_tokens=batch_tokens)).items():
        torch.testing.assert_close(one.need("sqnorm"), expected[name].need("sqnorm"), rtol=1e-5, atol=1e-8)


def test_linears_that_see_the_same_tensor_share_their_statistics(llama: PreTrainedModel, windows: Tensor) -> None:
    stats = collect(llama, windows)
    for index in range(3):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        assert stats[f"{attention}.q_proj"] is stats[f"{attention}.k_proj"] is stats[f"{attention}.v_proj"]
        assert stats[f"{mlp}.gate_proj"] is stats[f"{mlp}.up_proj"]
        assert stats[f"{mlp}.up_proj"] is not stats[f"{attention}.q_proj"]
        assert stats[f"{mlp}.up_proj"] is not stats[f"{mlp}.down_proj"]


def test_a_method_that_looks_at_nothing_costs_no_forward(llama: PreTrainedModel, windows: Tensor) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a forward was run")

    llama.model.forward = refuse
    for module in llama.model.layers:
        module.forward = refuse
    blocks = list(walk_blocks(llama, None, LiveWeights(llama)))
    assert [block.index for block in blocks] == [0, 1, 2]
    for block in blocks:
        assert {stats.tokens for stats in block.collect(frozenset()).values()} == {0}


def test_a_walk_leaves_the_model_as_it_was(decoder: PreTrainedModel, windows: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    collect(decoder, windows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    for module in decoder.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


def test_a_forward_that_was_put_on_a_block_stays_on_it(llama: PreTrainedModel, windows: Tensor) -> None:
    module, calls = llama.model.layers[1], []
    original = module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:  # as accelerate wraps the modules it moves
        calls.append(1)
        return original(*args, **kwargs)

    module.forward = counted
    collect(llama, windows)
    assert module.forward is counted
    assert len(calls) == 6  # three batches, twice


def test_windows_longer_than_gemmas_sliding_window_are_masked_by_layer(build_model, windows: Tensor) -> None:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    model = build_model(Gemma3TextConfig(**sizes, **heads, sliding_window=5, layer_types=kinds))
    assert windows.shape[1] > 5
    allowed: dict[int, int | None] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]  # (batch, 1, query, key), True = may be looked at; None = all before
        allowed[block.index] = None if mask is None else int(mask[0, 0, -1].sum())

    for block in walk_blocks(model, windows, LiveWeights(model), RAGGED):
        handle = block.module.register_forward_pre_hook(note, with_kwargs=True)
        block.collect(NEEDS)
        handle.remove()
    assert allowed == {0: 5, 1: None, 2: 5}


@pytest.mark.parametrize("bad", [-1, 64, 10**6])
def test_token_ids_outside_the_vocabulary(llama: PreTrainedModel, windows: Tensor, bad: int) -> None:
    windows[3, 4] = bad
    with pytest.raises(CalibrationError, match=rf"{bad}.*vocabulary has 64"):
        collect(llama, windows)


def test_no_window_is_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(CalibrationError, match="no calibration window"):
        collect(llama, torch.empty(0, 16, dtype=torch.int64))


def test_a_linear_that_sees_nothing_is_named(llama: PreTrainedModel, windows: Tensor) -> None:
    llama.model.layers[1].mlp.idle_proj = nn.Linear(32, 32)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.idle_proj: saw no token"):
        collect(llama, windows)


def test_activations_that_are_not_finite_name_the_linear(llama: PreTrainedModel, windows: Tensor) -> None:
    llama.model.layers[1].post_attention_layernorm.weight.data[7] = float("inf")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.gate_proj: input activations are not finite"):
        collect(llama, windows)


def test_a_model_that_calls_blocks_by_content_is_refused(llama: PreTrainedModel, windows: Tensor) -> None:
    rotary = llama.model.rotary_emb.forward
    llama.model.rotary_emb.forward = lambda x, position_ids: tuple(part + x.mean() for part in rotary(x, position_ids))
    with pytest.raises(UnsupportedModelError, match="calls its blocks differently for different text"):
        collect(llama, windows)


def test_a_model_that_leaves_blocks_out_is_refused(llama: PreTrainedModel, windows: Tensor) -> None:
    base = llama.model
    base.forward = lambda input_ids, use_cache: base.layers[0](base.embed_tokens(input_ids))
    with pytest.raises(UnsupportedModelError, match="called 1 of its 3 blocks"):
        collect(llama, windows)


@pytest.mark.parametrize(
    "result",
    [lambda hidden: hidden[..., :5], lambda hidden: {"hidden": hidden}, lambda hidden: hidden.double(), lambda _: None],
    ids=["narrower", "dict", "dtype", "None"],
)
def test_a_block_that_gives_back_no_hidden_states_is_refused(
    llama: PreTrainedModel, windows: Tensor, result: Callable[[Tensor], Any]
) -> None:
    llama.model.layers[1].forward = lambda hidden, **kwargs: result(hidden)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: gave back .*, not hidden states"):
        for _ in walk_blocks(llama, windows, LiveWeights(llama), RAGGED):
            pass


def test_blocks_that_give_back_tuples_are_understood(llama: PreTrainedModel, windows: Tensor) -> None:
    expected = collect(llama, windows)
    base = llama.model
    for module in base.layers:
        module.forward = (lambda original: lambda *a, **k: (original(*a, **k), "weights"))(module.forward)

    def forward(input_ids: Tensor, use_cache: bool) -> Tensor:  # as models of transformers 4 loop over their blocks
        hidden = base.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = base.rotary_emb(hidden, positions)
        for module in base.layers:
            hidden = module(hidden, attention_mask=None, position_embeddings=rotary)[0]
        return hidden

    base.forward = forward
    assert_same_stats(collect(llama, windows), expected)


def test_a_model_in_training_is_walked_without_dropout_and_left_in_training(build_model, windows: Tensor) -> None:
    from transformers import OPTConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.5))
    assert model.config.dropout > 0
    quiet = [block.collect(NEEDS) for block in walk_blocks(model, windows, LiveWeights(model))]
    model.train()
    for expected, block in zip(quiet, walk_blocks(model, windows, LiveWeights(model)), strict=True):
        for name, stats in block.collect(NEEDS).items():
            assert torch.equal(stats.sqnorm, expected[name].sqnorm), name
    assert model.training


def turn_through(
    model: PreTrainedModel, windows: Tensor, options: WalkOptions = RAGGED, change: Callable[[str], object] = id
) -> tuple[Stats, list[list[str]]]:
    """Statistics collected group by group, each linear changed after it was seen, and the groups."""
    stats: Stats = {}
    groups: list[list[str]] = []
    for block in walk_blocks(model, windows, LiveWeights(model), options):
        for group in block.collect_in_turn(NEEDS):
            stats |= group
            groups.append(list(group))
            for name in group:
                change(name)
    return stats, groups


def test_groups_in_turn_see_the_same_as_all_at_once_if_nothing_changes(
    decoder: PreTrainedModel, windows: Tensor
) -> None:
    if any(linear.expert is not None for linear in all_linears(decoder).values()):
        with pytest.raises(UnsupportedModelError, match="use order parallel"):
            turn_through(decoder, windows)
        return
    expected = collect(decoder, windows)
    assert_same_stats(turn_through(decoder, windows)[0], expected)


def test_linears_that_are_called_with_one_tensor_have_one_turn(llama: PreTrainedModel, windows: Tensor) -> None:
    _, groups = turn_through(llama, windows)
    short = [[name.rsplit(".", 1)[1] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 3


def test_groups_in_turn_see_what_the_changed_ones_before_them_put_out(
    decoder: PreTrainedModel, windows: Tensor
) -> None:
    if any(linear.expert is not None for linear in all_linears(decoder).values()):
        pytest.skip("experts are refused, as the test above holds")
    stats, _ = turn_through(
        decoder, windows, change=lambda name: decoder.get_parameter(f"{name}.weight").data.mul_(0.9)
    )
    modules: dict[str, nn.Module] = {name: linear.module for name, linear in all_linears(decoder).items()}
    # Every linear's inputs depend on changed weights only, so the changed model run as a whole sees the same.
    for name, seen in plain_forward(decoder, windows, modules).items():
        x = torch.cat([one.flatten(0, -2) for one in seen])
        torch.testing.assert_close(stats[name].need("sqnorm"), x.square().mean(0), rtol=1e-4, atol=1e-6)


def test_a_walk_in_turn_leaves_no_thread_and_no_hook_behind(llama: PreTrainedModel, windows: Tensor) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        turn_through(llama, windows, change=lambda name: 1 // 0)
    gc.collect()
    assert threading.active_count() == before
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_an_error_within_a_pass_in_turn_is_the_callers(llama: PreTrainedModel, windows: Tensor) -> None:
    calls = iter(range(100))

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if next(calls) < 2 else x.view(1, -1) @ x.view(1, -1)

    llama.model.layers[1].mlp.act_fn = Breaks()
    with pytest.raises(RuntimeError, match="shape"):
        turn_through(llama, windows)


def test_windows_that_do_not_fit_in_turn_are_refused(llama: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    options = WalkOptions(batch_tokens=48, memory_limit=1000, spill_folder=tmp_path)
    with pytest.raises(CalibrationError, match="order sequential holds about"):
        turn_through(llama, windows, options)


# --- what a block should put out ---


def what_goes_out(modules: dict[str, nn.Module], forward: Callable[[], object]) -> dict[str, Tensor]:
    """Every module's first output, all calls of ``forward`` put together."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[name].append((output[0] if isinstance(output, tuple) else output).clone())

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    with torch.inference_mode():
        forward()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(outputs) for name, outputs in seen.items()}


def attention(block: nn.Module) -> str:
    return next(name for name, child in block.named_children() if name in {"self_attn", "attention", "attn"})


@pytest.mark.parametrize("target", ["dense", "block"])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_targets_are_what_unchanged_blocks_put_out(
    decoder: PreTrainedModel, windows: Tensor, tmp_path: Path, target: Literal["dense", "block"], limit: int
) -> None:
    dense = copy.deepcopy(decoder)
    paths = [attention(module) for module in find_blocks(decoder).modules]

    def run(model: PreTrainedModel, index: int) -> dict[str, Tensor]:
        block = find_blocks(model).modules[index]
        modules = {"": block, paths[index]: block.get_submodule(paths[index])}
        return what_goes_out(modules, lambda: [model(ids, use_cache=False) for ids in windows.split(3)])

    options = WalkOptions(
        batch_tokens=48,
        target=target,
        tapped=lambda block: [attention(block)],
        memory_limit=limit,
        spill_folder=tmp_path,
    )
    for block in walk_blocks(decoder, windows, LiveWeights(decoder), options):
        expected = run(dense if target == "dense" else decoder, block.index)
        assert block.windows == len(windows)
        for path, outputs in expected.items():
            for window in range(len(windows)):
                hidden, call, wanted = block.example(window, path)
                assert torch.equal(wanted[0], outputs[window])
                assert not wanted.is_inference()
                assert not hidden.is_inference()
        if block.index == 0 or target == "block":
            again = call.run(block.module, hidden)  # with one window alone: the last bits may differ
            torch.testing.assert_close(hidden_states(again, hidden, block.name)[0], expected[""][-1])
        for linear in block.linears.values():
            linear.weight.data[:, ::2] = 0.0


def test_a_walk_that_goes_on_has_the_dense_outputs_of_the_source(
    tiny_llama_folder: Path, windows: Tensor, tmp_path: Path
) -> None:
    def walk(folder: Path, finished: set[str], start: int, stop: int) -> dict[str, Tensor]:
        model, weights, _ = streamed(tiny_llama_folder, folder, torch.float32, finished)
        seen: dict[str, Tensor] = {}
        for block in walk_blocks(model, windows, weights, WalkOptions(batch_tokens=48, target="dense"), start):
            if block.index == stop:
                break
            seen[block.name] = torch.cat([block.example(i)[2] for i in range(block.windows)])
            for name in block.linears:
                weights.replace_(f"{name}.weight", weights.read(f"{name}.weight").float() * 0.7)
            weights.finish_(block.name)
        return seen

    expected = walk(tmp_path / "a", set(), start=0, stop=3)
    first = walk(tmp_path / "b", set(), start=0, stop=2)
    found = first | walk(tmp_path / "b", {"model.layers.0", "model.layers.1"}, start=2, stop=3)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], outputs) for name, outputs in expected.items())
    dense = load_model(tiny_llama_folder, torch.float32)
    modules = {name: dense.get_submodule(name) for name in expected}
    plain = what_goes_out(modules, lambda: [dense(ids, use_cache=False) for ids in windows.split(3)])
    assert all(torch.equal(plain[name], outputs) for name, outputs in expected.items())


def test_targets_must_be_asked_for(llama: PreTrainedModel, windows: Tensor) -> None:
    block = next(walk_blocks(llama, windows, LiveWeights(llama), RAGGED))
    with pytest.raises(ValueError, match="was not asked for what the block should put out"):
        block.example(0)
    with pytest.raises(TypeError, match="does not keep what its blocks were"):
        next(walk_blocks(llama, windows, LiveWeights(llama), WalkOptions(target="dense"), start=1))


def test_batches_are_halved_where_memory_does_not_do(
    decoder: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that takes no more than two windows at once, and runs out of memory after half of its linears."""
    from compressllm.calibration.inputs import Call

    plain = copy.deepcopy(decoder)
    expected = collect(plain, windows)
    run, tried, said = Call.run, [], []

    def scarce(self: Call, module: nn.Module, hidden: Tensor) -> Any:
        tried.append(len(hidden))
        if len(hidden) > 2:
            run(self, module, hidden)
            raise torch.OutOfMemoryError
        return run(self, module, hidden)

    monkeypatch.setattr(Call, "run", scarce)
    found = collect(decoder, windows, WalkOptions(batch_tokens=64, warn=said.append))
    assert found.keys() == expected.keys()
    for name, stats in found.items():
        assert stats.tokens == expected[name].tokens
        torch.testing.assert_close(stats.sqnorm, expected[name].sqnorm, rtol=1e-4, atol=1e-6)
    assert tried[:2] == [4, 2]
    assert said == ["out of memory with 4 windows at once; going on with 2"]
