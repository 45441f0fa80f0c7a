"""Find the decoder blocks and prunable linears of any Hugging Face causal LM, by shape rather than class name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from compressllm.core.errors import UnsupportedModelError
from compressllm.models.linears import PrunableLinear, linears_of

ENCODER_DECODER = "is an encoder-decoder; only decoder-only causal language models are supported"


@dataclass(frozen=True)
class DecoderBlocks:
    """The decoder blocks of a model.

    Args:
        prefix: Module path of their ModuleList, for example ``model.layers``.
        modules: The blocks, front to back.
    """

    prefix: str
    modules: nn.ModuleList

    def name(self, index: int) -> str:
        """Module path of block ``index``."""
        return f"{self.prefix}.{index}"


def find_blocks(model: PreTrainedModel) -> DecoderBlocks:
    """The ModuleList as long as ``num_hidden_layers`` whose members hold linears.

    Raises: UnsupportedModelError if there is none, or more than one (an encoder-decoder, say).
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__}: {ENCODER_DECODER}")
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        DecoderBlocks(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(_weight_matrices(member) for member in module)
    ]
    outermost = [one for one in found if not any(one.prefix.startswith(f"{other.prefix}.") for other in found)]
    if len(outermost) != 1:
        places = ", ".join(one.prefix for one in outermost) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: needs one list of {depth} decoder blocks, found {places}; "
            "only decoder-only causal language models are supported"
        )
    return outermost[0]


def find_linears(block: nn.Module, prefix: str) -> dict[str, PrunableLinear]:
    """Prunable linears of one block: name -> linear, in definition order.

    Routers and one-output gates are left out: they choose, and a wrong choice costs more than it saves.

    Raises: UnsupportedModelError if the block keeps its matrices in a form that cannot be pruned yet.
    """
    linears: dict[str, PrunableLinear] = {}
    for name, module in block.named_modules():
        found = linears_of(module, f"{prefix}.{name}")
        fused = [key for key, value in module.named_parameters(recurse=False) if value.dim() == 3]
        if fused and not found:
            raise UnsupportedModelError(
                f"{prefix}.{name}.{fused[0]}: is a tensor of three dimensions of a kind that is not supported yet "
                "(experts held transposed or with biases, say, or a convolution)"
            )
        if name.rsplit(".", 1)[-1] in {"router", "gate"} or "router" in name:
            continue
        linears.update((linear.name, linear) for linear in found if linear.shape[0] > 1)
    if not linears:
        raise UnsupportedModelError(f"{prefix}: holds no linear to prune")
    return linears


def all_linears(model: PreTrainedModel) -> dict[str, PrunableLinear]:
    """The prunable linears of every block, front to back.

    Raises: UnsupportedModelError if one weight serves in two places.
    """
    blocks = find_blocks(model)
    linears: dict[str, PrunableLinear] = {}
    for index, module in enumerate(blocks.modules):
        linears.update(find_linears(module, blocks.name(index)))
    prunable = {linear.parameter for linear in linears.values()}
    users: dict[int, str] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        source = model.all_tied_weights_keys.get(name, name)  # on the meta device tied parameters are not one object
        first = users.setdefault(id(model.get_parameter(source)), source)
        if first != name and (first in prunable or name in prunable):
            owner, other = name.removesuffix(".weight"), first.removesuffix(".weight")
            raise UnsupportedModelError(f"{owner}: shares its weight with {other}; tied linears cannot be pruned")
    return linears


def _weight_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())
