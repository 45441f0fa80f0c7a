import pytest
import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError
from compressllm.core.stats import InputStats, StatsAccumulator

ALL = frozenset({"mean", "var", "sqnorm", "hessian"})


def random_inputs(tokens: int = 512, columns: int = 12) -> Tensor:
    """Inputs with correlated columns, columns far from zero, and a dead one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x += 10.0 * torch.arange(columns)
    x[:, 3] = 0.0
    return x


def exact(x: Tensor) -> dict[str, Tensor]:
    x = x.double()
    return {
        "mean": x.mean(0),
        "var": x.var(0, correction=0),
        "sqnorm": (x**2).mean(0),
        "hessian": x.T @ x / len(x),
    }


def assert_close(stats: InputStats, x: Tensor) -> None:
    assert stats.tokens == len(x)
    for name, expected in exact(x).items():
        found = stats.need(name)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def accumulate(*batches: Tensor, needs: frozenset = ALL) -> StatsAccumulator:
    stats = StatsAccumulator(needs)
    for batch in batches:
        stats.add_(batch)
    return stats


@pytest.mark.parametrize("seed", range(4))
def test_streaming_in_random_chunks_equals_one_shot_in_double(seed: int) -> None:
    x = random_inputs()
    cuts = torch.randint(0, len(x), (9,), generator=torch.Generator().manual_seed(seed)).sort().values
    assert_close(accumulate(*x.tensor_split(cuts)).finish("q"), x)


@pytest.mark.parametrize("needs", [{"mean"}, {"var"}, {"sqnorm"}, {"hessian"}, {"sqnorm", "hessian"}, {"mean", "var"}])
def test_each_statistic_can_be_had_alone(needs: set[str]) -> None:
    x = random_inputs()
    stats = accumulate(*x.chunk(3), needs=frozenset(needs)).finish("q")
    for name in needs:
        torch.testing.assert_close(stats.need(name).double(), exact(x)[name], rtol=1e-5, atol=1e-4)


def test_every_row_is_a_token_whatever_the_shape() -> None:
    x = random_inputs(tokens=512)
    assert_close(accumulate(x.view(4, 128, -1)).finish("q"), x)
    assert_close(accumulate(x[:256], x[256:].view(2, 128, -1)).finish("q"), x)


def test_variance_far_from_zero_is_not_lost_to_cancellation() -> None:
    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) + 1000.0
    found = accumulate(*x.chunk(7)).finish("q").need("var")
    torch.testing.assert_close(found.double(), exact(x)["var"], rtol=1e-3, atol=0.0)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    x = torch.full((64, 2), 300.0, dtype=torch.float16)  # 300 squared is past float16's largest number
    stats = accumulate(x).finish("q")
    assert stats.need("sqnorm").tolist() == [90000.0, 90000.0]
    assert stats.need("hessian").tolist() == [[90000.0, 90000.0]] * 2


def test_merged_accumulators_equal_one_that_saw_all() -> None:
    x = random_inputs()
    merged, other = accumulate(x[:100], x[100:130]), accumulate(x[130:])
    merged.merge_(other)
    assert_close(merged.finish("q"), x)
    merged = StatsAccumulator(ALL)
    for part in (StatsAccumulator(ALL), accumulate(x[:1]), StatsAccumulator(ALL), accumulate(x[1:])):
        merged.merge_(part)
    assert_close(merged.finish("q"), x)


def test_merging_leaves_the_other_accumulator_alone() -> None:
    x = random_inputs()
    first, second, merged = accumulate(x[:100]), accumulate(x[100:]), StatsAccumulator(ALL)
    merged.merge_(first)
    merged.merge_(second)
    merged.add_(x)
    assert_close(first.finish("q"), x[:100])
    assert_close(second.finish("q"), x[100:])


@pytest.mark.parametrize("needs", [{"mean"}, {"var"}, {"sqnorm"}, {"hessian"}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_names_the_linear(bad: float, needs: set[str]) -> None:
    x = random_inputs()
    x[77, 5] = bad
    stats = accumulate(x[:50], x[50:200], x[200:], needs=frozenset(needs))
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.mlp\.up_proj: input activations are not finite"):
        stats.finish("model.layers.3.mlp.up_proj")


def test_no_token_is_an_error_that_names_the_linear() -> None:
    for stats in (StatsAccumulator(ALL), accumulate(torch.empty(0, 4)), accumulate(torch.empty(2, 0, 4))):
        with pytest.raises(CalibrationError, match=r"experts\.7\.up_proj: saw no token"):
            stats.finish("experts.7.up_proj")


def test_what_was_not_collected_cannot_be_needed() -> None:
    stats = accumulate(random_inputs(), needs=frozenset({"mean"})).finish("q")
    assert (stats.var, stats.sqnorm, stats.hessian) == (None, None, None)
    with pytest.raises(CalibrationError, match="'sqnorm' was not collected"):
        stats.need("sqnorm")
