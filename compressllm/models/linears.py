"""A prunable linear: an (out, in) weight, whatever form its module holds it in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

#: What a module that holds all experts of a mixture has to say of itself to be understood.
_EXPERTS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
}
_NEW_IN_5_23 = {"has_post_expert_norm": False}  # older versions have none such, and say nothing of it


@dataclass(frozen=True)
class PrunableLinear:
    """One linear map whose weight can be pruned. Names and modules only: the weight is looked up at every access.

    Args:
        name: What masks, plans and reports call it: its module path, or of one expert of a mixture the path it would
            have as a module of its own, ``….experts.3.gate_proj``.
        module: Whose parameter the weight is or is a part of.
        parameter: Path of that parameter in the model.
        transposed: Whether it is held and stored as (in, out), as Conv1D does (GPT-2 family).
        expert: The expert's place in a parameter that holds those of all experts, (experts, rows, in); else None.
        rows: First row of it, and the one after its last; only for an expert, whose gate and up lie in one parameter.
    """

    name: str
    module: nn.Module
    parameter: str
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)

    @property
    def leaf(self) -> str:
        """Name of the parameter in its module."""
        return self.parameter.rpartition(".")[2]

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight: a view of the parameter, so that what is changed in it changes the model."""
        held: Tensor = getattr(self.module, self.leaf).data
        return self.turned(held) if self.expert is None else held[self.expert, self.rows[0] : self.rows[1]]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.weight.shape
        return out, columns

    @property
    def form(self) -> str | None:
        """How it is held, for messages; None if the parameter is the (out, in) weight as it is."""
        if self.expert is not None:
            return "an expert of a mixture, whose experts are held in one tensor"
        return "a Conv1D, which holds its weight as (in, out)" if self.transposed else None

    def turned(self, weight: Tensor) -> Tensor:
        """Its tensor in a checkpoint as (out, in), or an (out, in) weight as it is stored there; a view."""
        return weight.T if self.transposed else weight


def linears_of(module: nn.Module, path: str) -> list[PrunableLinear]:
    """The linears whose weights are parameters of ``module`` itself, which is at ``path``; none of most modules."""
    if isinstance(module, nn.Linear | Conv1D):
        return [PrunableLinear(path, module, f"{path}.weight", transposed=isinstance(module, Conv1D))]
    if not _holds_experts(module):
        return []
    experts, hidden, inner = module.down_proj.shape  # type: ignore[misc]
    rows = {
        "gate_proj": ("gate_up_proj", (0, inner)),
        "up_proj": ("gate_up_proj", (inner, 2 * inner)),
        "down_proj": ("down_proj", (0, hidden)),
    }
    return [
        PrunableLinear(f"{path}.{expert}.{part}", module, f"{path}.{held}", expert=expert, rows=span)
        for expert in range(experts)
        for part, (held, span) in rows.items()
    ]


def held_otherwise(model: nn.Module) -> dict[str, PrunableLinear]:
    """Weight name -> linear, of those whose parameter is not the (out, in) weight as it is."""
    found = [linear for path, module in model.named_modules() for linear in linears_of(module, path)]
    return {f"{linear.name}.weight": linear for linear in found if linear.form}


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers 5 does: gate and up (experts, 2 inner, hidden), down the other."""
    held = {key: value.shape for key, value in module.named_parameters(recurse=False)}
    if held.keys() != {"gate_up_proj", "down_proj"} or any(len(shape) != 3 for shape in held.values()):
        return False
    experts, hidden, inner = held["down_proj"]
    known = all(getattr(module, key, None) is value for key, value in _EXPERTS.items())
    known = known and all(getattr(module, key, value) is value for key, value in _NEW_IN_5_23.items())
    return known and tuple(held["gate_up_proj"]) == (experts, 2 * inner, hidden)
