"""Masks on the way from dense to their pattern, step by step."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.recover.masking import MaskedWeight, Masking
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.tightening import Gradual, MaskDecay, StructureDecay, keep_share

STEPS, PERIOD, LAST = 12, 3, 9
HALF = NM(2, 4)


def trained(make: Callable[[dict[str, MaskedWeight]], Masking], pattern: SparsityPattern = HALF) -> list[Tensor]:
    """The parameter before the first step and after each of `STEPS`, refreshed as the loop does it."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    masking = make({"w": MaskedWeight(pattern.keep(weight.abs()), pattern)})
    optimizer = Optimizer({"w": weight}, masking, (0.9, 0.95), 0.0)
    seen = [weight.clone()]
    random = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        gradients = {"w": torch.randn(6, 16, generator=random)}
        masking.clean_(gradients)
        optimizer.step_(gradients, 0.02)
        if masking.refreshes(step):
            masking.refresh_(optimizer.effective, step)
            optimizer.write_()
        seen.append(weight.clone())
    assert masking.settled(STEPS)
    assert pattern.violations(optimizer.result("w") != 0) == 0
    return seen


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "layer")], ids=str)
def test_gradual_prunes_more_and_more_and_gives_nothing_back(pattern: SparsityPattern) -> None:
    seen = trained(lambda w: Gradual(w, lambda step: min(1.0, step / LAST), PERIOD, LAST), pattern)
    zeros = [int((weight == 0).sum()) for weight in seen]
    assert zeros[0] == zeros[PERIOD - 1] == 0
    assert zeros[PERIOD] < zeros[2 * PERIOD] < zeros[LAST] == zeros[STEPS] == 48
    for before, after in itertools.pairwise(seen):
        assert not after[before == 0].any(), "what is pruned stays so"
        assert not torch.equal(after[after != 0], before[after != 0]), "and the rest is trained"


def test_a_share_of_the_groups_is_pruned_those_that_lose_least() -> None:
    size = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    keep = keep_share(NM(2, 4), size, 0.5)
    for row, mask in zip(size.view(3, 4, 4), keep.view(3, 4, 4), strict=True):
        lost = [float(group.sort().values[:2].sum()) for group in row]
        cheapest = sorted(range(4), key=lost.__getitem__)[:2]
        assert [int(one.sum()) for one in mask] == [2 if at in cheapest else 4 for at in range(4)]
    assert keep_share(NM(2, 4), size, 0.0).all()
    assert torch.equal(keep_share(NM(2, 4), size, 1.0), NM(2, 4).keep(size))


def test_mask_decay_shrinks_what_is_pruned_and_trains_all() -> None:
    factors = [max(0.0, 1 - step / LAST) for step in range(STEPS + 1)]
    masks: list[Masking] = []

    def make(weights: dict[str, MaskedWeight]) -> Masking:
        masks.append(MaskDecay(weights, factors.__getitem__, PERIOD, LAST))
        return masks[0]

    seen = trained(make)
    keep = masks[0].weights["w"].keep
    assert seen[0].all(), "the forward begins dense"
    assert not seen[STEPS][~keep].any()
    assert seen[STEPS - 1][keep].all()
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    masking = MaskDecay({"w": MaskedWeight(NM(2, 4).keep(weight.abs()), NM(2, 4))}, lambda step: 0.25, 1, 9)
    assert torch.equal(masking.forward_weight("w", weight, 5), torch.tensor([[0.25, -0.5, 3.0, 4.0]]))


def test_structure_decay_goes_from_pattern_to_pattern() -> None:
    seen = trained(lambda w: StructureDecay(w, lambda final, step: NM(3, 4) if step < 6 else final, 4, 8))
    kept = [(weight.view(6, 4, 4) != 0).sum(-1) for weight in seen]
    assert all((one == 3).all() for one in kept[:6])
    assert all((one == 2).all() for one in kept[6:]), "the next pattern begins on its step, whatever the period"
    returned = (seen[5] == 0) & (seen[6] != 0)
    masks = [(weight != 0) for weight in seen]
    assert not torch.equal(masks[3], masks[4]) or bool(returned.any()), "what was pruned may come back"
