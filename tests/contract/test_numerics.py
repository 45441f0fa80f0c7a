"""Statistics and weights at the edge of what numbers can hold: every pruner and quantizer stays finite."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import PRUNERS, QUANTIZERS
from compressllm.core.registry import build
from compressllm.core.scheme import parse_scheme
from compressllm.core.stats import InputStats, StatsAccumulator

STATISTICS = frozenset({"mean", "var", "sqnorm", "hessian"})
PATTERNS = [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")]
OUT, COLUMNS, TOKENS = 24, 48, 96


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectrum(tokens: int, smallest: float) -> Tensor:
    """Inputs in which every direction is rarer than the one before, by the same factor."""
    basis = torch.linalg.qr(noise(COLUMNS, COLUMNS, seed=1))[0]
    return (noise(tokens, COLUMNS) * torch.logspace(0, smallest, COLUMNS)) @ basis


#: What a linear may be given -> (tokens, in) inputs.
INPUTS: dict[str, Callable[[], Tensor]] = {
    "one token": lambda: noise(1, COLUMNS),
    "fewer tokens than inputs": lambda: noise(5, COLUMNS),
    "rank one": lambda: noise(TOKENS, 1) @ noise(1, COLUMNS, seed=1),
    "constant": lambda: torch.full((TOKENS, COLUMNS), 0.7),
    "dead but for one": lambda: noise(TOKENS, COLUMNS) * (torch.arange(COLUMNS) == 3),
    "all dead": lambda: torch.zeros(TOKENS, COLUMNS),
    "ill-conditioned": lambda: spectrum(TOKENS, -7),
    "columns of every size": lambda: noise(TOKENS, COLUMNS) * torch.logspace(-12, 6, COLUMNS),
    "one input a million times the others": lambda: noise(TOKENS, COLUMNS) * (1 + 1e6 * (torch.arange(COLUMNS) == 5)),
    "float16 at its limit": lambda: (noise(TOKENS, COLUMNS).sign() * 65504).half(),
    "as large as float32 squares can be": lambda: noise(TOKENS, COLUMNS) * 1e17,
    "so small that squares vanish": lambda: noise(TOKENS, COLUMNS) * 1e-30,
    "so small that squares are denormal": lambda: noise(TOKENS, COLUMNS) * 1e-20,
    "denormal": lambda: noise(TOKENS, COLUMNS) * 1e-40,
}

#: What a checkpoint may hold -> (out, in) weight.
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(OUT, COLUMNS),
    "denormal": lambda: noise(OUT, COLUMNS) * 1e-41,
    "one denormal among others": lambda: noise(OUT, COLUMNS).index_fill(1, torch.tensor([7]), 1e-45),
    "float16 at its limit": lambda: noise(OUT, COLUMNS).sign() * 65504,
    "of every size": lambda: noise(OUT, COLUMNS) * torch.logspace(-30, 4, COLUMNS),
    "one far larger than the others": lambda: noise(OUT, COLUMNS).index_fill(1, torch.tensor([9]), 3e4),
}
PLAIN_INPUTS, PLAIN_WEIGHT = noise(TOKENS, COLUMNS) + 0.5, noise(OUT, COLUMNS, seed=2)


def stats_of(x: Tensor) -> InputStats:
    stats = StatsAccumulator(STATISTICS)
    stats.add_(x)
    return stats.finish("layer")


CASES = {
    **{f"inputs {name}": (lambda make=make: (PLAIN_WEIGHT.clone(), stats_of(make()))) for name, make in INPUTS.items()},
    **{f"weights {name}": (lambda make=make: (make(), stats_of(PLAIN_INPUTS))) for name, make in WEIGHTS.items()},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PRUNERS.names())
def test_a_pruner_stays_finite_and_keeps_its_counts(name: str, case: str) -> None:
    assert len(PRUNERS.names()) > 5
    weight, stats = CASES[case]()
    for pattern in PATTERNS:
        once, again = (build(PRUNERS, name).prune(weight, stats, pattern) for _ in range(2))
        assert once.weight.isfinite().all(), pattern
        assert pattern.violations(once.keep) == 0, pattern
        assert int(once.keep.sum()) == OUT * COLUMNS // 2, pattern
        assert not raw(once.weight)[~once.keep].any(), pattern
        assert torch.equal(raw(once.weight), raw(again.weight)), pattern


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PRUNERS.names())
def test_what_is_kept_is_no_worse_than_nothing(name: str, case: str) -> None:
    """A solver whose numbers went wrong while they stayed finite leaves more error than a layer of zeros would."""
    weight, stats = CASES[case]()
    hessian = stats.need("hessian").double()
    before = weight.double()
    scale = float((before @ hessian * before).sum())
    made = build(PRUNERS, name).prune(weight, stats, NM(2, 4)).weight.double() - before
    assert float((made @ hessian * made).sum()) <= max(1.01 * scale, 1e-300) or name == "random"


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "fp8"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", QUANTIZERS.names())
def test_a_quantizer_stays_finite(name: str, case: str, scheme: str) -> None:
    weight, stats = CASES[case]()
    keep = NM(2, 4).keep(weight.abs())
    quantizer, pruned = build(QUANTIZERS, name), weight.masked_fill(~keep, 0.0)
    made = quantizer.quantize(pruned, keep, stats, parse_scheme(scheme)).weight
    assert made.scales.isfinite().all()
    assert made.dequantize(torch.float32).isfinite().all()
    assert not made.codes.float()[~keep].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("statistic", sorted(STATISTICS))
def test_statistics_of_what_is_not_finite_name_the_linear(statistic: str, value: float) -> None:
    x = noise(TOKENS, COLUMNS)
    x[17, 3] = value
    stats = StatsAccumulator(frozenset({statistic}))
    stats.add_(x)
    with pytest.raises(CalibrationError, match=r"^model\.layers\.3\.up_proj: input activations are not finite"):
        stats.finish("model.layers.3.up_proj")


def test_squares_that_overflow_are_found() -> None:
    stats = StatsAccumulator(frozenset({"sqnorm"}))
    stats.add_(noise(TOKENS, COLUMNS) * 1e25)
    with pytest.raises(CalibrationError, match=r"^layer: input activations are not finite"):
        stats.finish("layer")
