import math

import pytest
import torch

from compressllm.core.pattern import NM, SparsityPattern, Unstructured, parse_pattern
from compressllm.prune.apportion import apportion, asked_sparsity, fraction_of, planned_sparsity

# One block of SmolLM2-135M, of which it has 30.
BLOCK = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
SMOL = {f"{index}.{name}": shape for index in range(30) for name, shape in BLOCK.items()}


def removed(plan: dict[str, SparsityPattern], shapes: dict[str, tuple[int, int]]) -> float:
    """Fraction removed, counted on masks of random scores."""
    scores = {shape: torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in set(shapes.values())}
    kept = {
        (pattern, shape): int(pattern.keep(scores[shape]).sum())
        for pattern, shape in {(plan[name], shapes[name]) for name in plan}
    }
    total = sum(math.prod(shape) for shape in shapes.values())
    return 1 - sum(kept[plan[name], shapes[name]] for name in plan) / total


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.5, 0.55, 0.6, 0.7, 0.333])
def test_the_total_is_what_was_asked(sparsity: float, group: str) -> None:
    asked = dict.fromkeys(SMOL, Unstructured(sparsity, group))
    plan = apportion(asked, SMOL)
    assert list(plan) == list(SMOL)
    assert planned_sparsity(plan, SMOL) == pytest.approx(sparsity, abs=1e-5)
    assert asked_sparsity(asked, SMOL) == pytest.approx(sparsity, abs=1e-12)
    for name, pattern in plan.items():
        size = SMOL[name][1] if group == "row" else math.prod(SMOL[name])
        assert pattern.removed_of(size) in {math.floor(size * sparsity + 1e-9), math.ceil(size * sparsity - 1e-9)}


def test_the_planned_sparsity_is_what_masks_come_to() -> None:
    shapes = {name: (out // 8, columns) for name, (out, columns) in SMOL.items()}
    for group in ("row", "layer"):
        plan = apportion(dict.fromkeys(shapes, Unstructured(0.6, group)), shapes)
        assert removed(plan, shapes) == pytest.approx(planned_sparsity(plan, shapes), abs=1e-12)
        assert removed(plan, shapes) == pytest.approx(0.6, abs=1e-5)


def test_rounding_down_alone_would_miss() -> None:
    assert planned_sparsity(dict.fromkeys(SMOL, Unstructured(0.6, "row")), SMOL) < 0.6 - 5e-4


def test_blocks_share_the_rounding_alike() -> None:
    plan = apportion(dict.fromkeys(SMOL, Unstructured(0.6, "row")), SMOL)
    for index in range(30):
        block = {name: plan[name] for name in SMOL if name.startswith(f"{index}.")}
        assert planned_sparsity(block, {name: SMOL[name] for name in block}) == pytest.approx(0.6, abs=2e-4)


def test_a_plan_that_is_whole_or_near_reads_as_it_was_asked() -> None:
    shapes = {"a": (16, 32), "b": (8, 48)}
    half = dict.fromkeys(shapes, Unstructured(0.5, "row"))
    assert apportion(half, shapes) == half
    large = {"a": (4096, 4096)}
    near = dict.fromkeys(large, Unstructured(0.6, "layer"))
    assert apportion(near, large) == near


@pytest.mark.parametrize("sparsity", [0.1, 0.31, 0.333, 0.47, 0.6, 0.77, 0.9])
def test_no_other_rounding_of_a_few_linears_is_nearer(sparsity: float) -> None:
    shapes = {"a": (5, 7), "b": (3, 11), "c": (2, 13)}
    asked = dict.fromkeys(shapes, Unstructured(sparsity, "row"))
    target = sum(math.prod(shape) for shape in shapes.values()) * sparsity
    plan = apportion(asked, shapes)
    mine = sum(out * plan[name].removed_of(size) for name, (out, size) in shapes.items())
    floors = {name: math.floor(size * sparsity) for name, (_, size) in shapes.items()}
    best = min(
        abs(
            sum(out * (floors[name] + bool(bits >> i & 1)) for i, (name, (out, _)) in enumerate(shapes.items()))
            - target
        )
        for bits in range(8)
    )
    assert abs(mine - target) == pytest.approx(best, abs=1e-6)


def test_other_patterns_and_fractions_are_left_alone_and_counted() -> None:
    shapes = {"a": (8, 16), "b": (8, 15), "c": (8, 15)}
    plan = apportion({"a": NM(2, 4), "b": Unstructured(0.5, "row"), "c": Unstructured(0.5, "row")}, shapes)
    assert plan["a"] == NM(2, 4)
    assert sorted(plan[name].removed_of(15) for name in "bc") == [7, 8]
    assert planned_sparsity(plan, shapes) == 0.5
    ends = {"a": Unstructured(0.0, "row"), "b": Unstructured(1.0, "row")}
    assert apportion(ends, {"a": (8, 15), "b": (8, 15)}) == ends


@pytest.mark.parametrize(
    ("count", "size"), [(346, 576), (1, 3), (0, 7), (7, 7), (199066, 331776), (2**28 + 1, 2**29 - 3)]
)
def test_a_fraction_gives_its_count_and_its_text_back(count: int, size: int) -> None:
    for group in ("row", "layer"):
        pattern = Unstructured(fraction_of(count, size), group)
        assert pattern.removed_of(size) == count
        assert parse_pattern(str(pattern)) == pattern
