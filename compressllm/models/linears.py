"""A prunable linear: an (out, in) weight, whatever form its module holds it in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class PrunableLinear:
    """One linear map whose weight can be pruned. Names and modules only: the weight is looked up at every access.

    Args:
        name: What masks, plans and reports call it: its module path.
        module: Whose parameter the weight is.
        parameter: Path of that parameter in the model.
        transposed: Whether it is held and stored as (in, out), as Conv1D does (GPT-2 family).
    """

    name: str
    module: nn.Module
    parameter: str
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight: a view of the parameter, so that what is changed in it changes the model."""
        return self.turned(getattr(self.module, self.parameter.rpartition(".")[2]).data)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.weight.shape
        return out, columns

    @property
    def plain(self) -> bool:
        """Whether the parameter is the (out, in) weight as it is."""
        return not self.transposed

    @property
    def form(self) -> str | None:
        """How it is held, for messages; None if it is an nn.Linear."""
        return "a Conv1D, which holds its weight as (in, out)" if self.transposed else None

    def turned(self, weight: Tensor) -> Tensor:
        """A stored tensor as (out, in), or an (out, in) weight as it is stored; a view."""
        return weight.T if self.transposed else weight


def linears_of(module: nn.Module, path: str) -> list[PrunableLinear]:
    """The linears whose weights are parameters of ``module`` itself, which is at ``path``; none of most modules."""
    if isinstance(module, nn.Linear | Conv1D):
        return [PrunableLinear(path, module, f"{path}.weight", transposed=isinstance(module, Conv1D))]
    return []


def held_otherwise(model: nn.Module) -> dict[str, PrunableLinear]:
    """Weight name -> linear, of those whose parameter is not the (out, in) weight as it is."""
    found = [linear for path, module in model.named_modules() for linear in linears_of(module, path)]
    return {f"{linear.name}.weight": linear for linear in found if not linear.plain}
