"""The weights of losses, as they are written."""

import pytest

from compressllm.core.errors import RecipeError
from compressllm.recover.losses import LossWeights


def test_reads_what_it_writes() -> None:
    weights = LossWeights.parse("kl=1.0, squarehead=0.5")
    assert weights == LossWeights(kl=1.0, squarehead=0.5)
    assert LossWeights.parse(str(weights)) == weights
    assert LossWeights.parse({"kl": 1, "squarehead": 0.5}) == weights


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kls=1", "unknown loss 'kls'; did you mean 'kl'?"),
        ("kl", "'kl' has no weight"),
        ("kl=1,kl=2", "given twice"),
        ("kl=much", "not a number"),
        ("kl=-1", "0 or more"),
        ("ce=nan", "0 or more"),
        ("ce=0", "none has a weight above 0"),
    ],
)
def test_refuses(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        LossWeights.parse(spec)


def test_says_what_it_needs() -> None:
    assert not LossWeights(ce=1).need_teacher
    assert LossWeights(squarehead=1).need_teacher
    assert not LossWeights(squarehead=1).at_head
