"""SLoRB: a small dense branch beside each masked linear, trained together with its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressllm.core.errors import FormatError, RecipeError, UnsupportedModelError

#: What becomes of the branches when training is over; see `SLoRB`.
ExportPolicy = Literal["forbid", "drop", "merge"]


class BranchedLinear(nn.Module):
    """``y = x W^T + b + (x X^T) S^T``: a linear and its branch, X (in / k, in) and S (out, in / k).

    Weight and bias go by the names they had, so that the model's tensors are found as before.

    Args:
        linear: What it stands for. Its parameters are used, not copied.
        branch: (out, in / k), where S begins.
        projected: Train X, which begins as the sum over each block of k inputs; else it is that sum, and not stored.
    """

    bias: nn.Parameter | None
    slorb_x: nn.Parameter | None

    def __init__(self, linear: nn.Linear, branch: Tensor, projected: bool) -> None:
        super().__init__()
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.slorb_s = nn.Parameter(branch.to(linear.weight))
        blocks, columns = branch.shape[1], linear.in_features
        sums = torch.eye(blocks).repeat_interleave(columns // blocks, dim=1)  # row i is 1 on block i
        self.register_parameter("slorb_x", nn.Parameter(sums.to(linear.weight)) if projected else None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.slorb_x is None:
            inner = x.reshape(*x.shape[:-1], self.slorb_s.shape[1], -1).sum(-1)
        else:
            inner = functional.linear(x, self.slorb_x)
        return functional.linear(x, self.weight, self.bias) + functional.linear(inner, self.slorb_s)

    @torch.no_grad()
    def product(self) -> Tensor:
        """S X, (out, in) float32: what the branch adds to the weight."""
        branch = self.slorb_s.float()
        if self.slorb_x is not None:
            return branch @ self.slorb_x.float()
        return branch.repeat_interleave(self.weight.shape[1] // branch.shape[1], dim=1)

    def plain(self) -> nn.Linear:
        """The linear without its branch."""
        out, columns = self.weight.shape
        with torch.device("meta"):
            linear = nn.Linear(columns, out, bias=False)
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)


@dataclass(frozen=True)
class SLoRB:
    """Branches beside all masked linears: capacity for training, 1 / k of a matrix each, twice that if X is trained.

    A branch is dense: added to its weight it fills the zeros, and left out the model computes something else. There is
    no form in which a checkpoint keeps it beside its weight, so whoever trains with branches must say beforehand which
    of the two it is to be; the rest is refused before anything is trained.

    Args:
        block: k, inputs that share a column of S.
        projected: Train X too, as both released configurations do.
        export: When training is over ``drop`` the branches, or ``merge`` them into weights that are dense from then on;
            or ``forbid`` training with them.

    Source: Huang et al., Adaptive Sparse Trainer, AAAI 2025.
    """

    block: int = 16
    projected: bool = True
    export: ExportPolicy = "forbid"

    def attach_(self, model: nn.Module, masks: Mapping[str, Tensor], dense: Callable[[str], Tensor]) -> None:
        """Put a branch beside each masked linear, whose weight is masked already. Changes ``model`` in place.

        S begins with the mean, over each block of a row, of what pruning took from the dense weight: so a row's sum
        over each block is what it was. Pruned weights alone make up the difference where the others are unchanged,
        and kept ones count as 0, as the paper's "mean of pruned weights" means it.

        Args:
            masks: Linear name -> (out, in) bool mask.
            dense: Gives the (out, in) weight that a linear had before it was pruned.

        Raises: RecipeError if branches are forbidden, or a width is no multiple of the block; UnsupportedModelError
            for a masked linear that is no nn.Linear. Nothing is changed then.
        """
        if self.export == "forbid":
            raise RecipeError(
                "slorb: a branch is dense, and no checkpoint with the mask's zeros can hold it; "
                "say export: drop to train with branches and leave them out of the result, export: merge for a dense "
                "result, or train without"
            )
        branched: dict[str, BranchedLinear] = {}
        for name in masks:
            linear = _linear(model, name, self.block)
            lost = dense(name).to(linear.weight.device, torch.float32) - linear.weight.detach().float()
            branch = lost.view(lost.shape[0], -1, self.block).mean(-1)
            branched[name] = BranchedLinear(linear, branch, self.projected)
        for name, module in branched.items():
            model.set_submodule(name, module)

    def detach_(self, model: nn.Module) -> dict[str, Any]:
        """Leave the branches out again, or merge them into their weights. Changes ``model`` in place.

        Returns: How much that was, for the manifest: the norm of all branches over that of all weights, and the
        fraction of the branches' squared norm that lies on pruned weights.
        """
        weights = branches = outside = 0.0
        for name, module in list(_branched(model)):
            product, weight = module.product(), module.weight.detach()
            size = product.square()
            weights += float(weight.float().square().sum(dtype=torch.float64))
            branches += float(size.sum(dtype=torch.float64))
            outside += float(size.masked_fill_(weight != 0, 0.0).sum(dtype=torch.float64))
            if self.export == "merge":
                weight.add_(product.to(weight.dtype))
            model.set_submodule(name, module.plain())
        if not weights:
            raise FormatError("the model has no branches to leave out")
        return {
            "export": self.export,
            "branch_to_weight_norm": (branches / weights) ** 0.5,
            "branch_on_pruned": outside / (branches or 1.0),
        }


def _branched(model: nn.Module) -> Iterator[tuple[str, BranchedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, BranchedLinear):
            yield name, module


def _linear(model: nn.Module, name: str, block: int) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None  # held together with others in one tensor
    if not isinstance(linear, nn.Linear):
        raise UnsupportedModelError(f"{name}: is no nn.Linear, which a branch needs beside it; train without slorb")
    if linear.in_features % block:
        raise RecipeError(f"{name}: {linear.in_features} inputs are not a multiple of slorb's block of {block}")
    return linear
