import pytest
import torch
from torch import nn

from compressllm.core.finite import first_not_finite, said_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.second(self.act(self.first(x)).exp())}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["first", "second"])
def test_the_first_module_is_named_and_no_hook_stays(where: str, value: float) -> None:
    model, x = Model(), torch.ones(2, 4)
    assert first_not_finite(model, lambda: model(x)) is None
    getattr(model, where).bias.data[1] = value
    assert first_not_finite(model, lambda: model(x)) == where
    assert not any(module._forward_hooks for module in model.modules())


def test_what_overflows_between_modules_shows_at_the_next() -> None:
    model = Model()
    model.first.bias.data.fill_(100.0)
    assert first_not_finite(model, lambda: model(torch.ones(2, 4))) == "second"


def test_errors_of_the_forward_pass_are_not_hidden() -> None:
    model = Model()
    with pytest.raises(RuntimeError):
        first_not_finite(model, lambda: model(torch.ones(2, 5)))
    assert not any(module._forward_hooks for module in model.modules())


def test_how_it_is_said() -> None:
    assert said_of(None) == ""
    assert said_of("a.b") == ", first in the output of a.b"
