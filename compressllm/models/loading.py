"""From a checkpoint to its skeleton, its model and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from compressllm.core.errors import FormatError, UnsupportedModelError
from compressllm.core.heap import trim_heap
from compressllm.models.blocks import ENCODER_DECODER
from compressllm.models.checkpoint import Checkpoint, first_line
from compressllm.models.experts import place_expert_
from compressllm.models.linears import held_otherwise
from compressllm.models.resolve import resolve_model
from compressllm.models.sidefiles import read_json
from compressllm.models.tensornames import tensor_names

#: Settings that say how many modules are built, whatever the weights are.
_COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")
_MOST_BUFFERS = 1 << 30  # the masks of GPT-2's kind, the square of its positions, have a megabyte


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model's modules with every parameter on the meta device and every buffer real.

    Args:
        dtype: Dtype of the parameters; None takes the checkpoint's.

    Raises: UnsupportedModelError if transformers knows no causal LM for the config; FormatError if the
        checkpoint lacks a tensor the config's model needs or holds one of another shape.
    """
    config = checkpoint.config()
    if getattr(config, "is_encoder_decoder", False):  # transformers would build the decoder alone
        raise UnsupportedModelError(f"{checkpoint.folder}: {ENCODER_DECODER}")
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.float32
    _check_counts(config, checkpoint)
    with torch.device("meta"), no_init_weights():
        outline = _built(config, dtype, checkpoint)
    _check_buffers(outline, checkpoint)
    tensor_names(outline, checkpoint)  # finds what does not fit before any memory is taken
    with init_empty_weights(include_buffers=False):
        model = _built(config, dtype, checkpoint)
    return model.eval()


def _built(config: PreTrainedConfig, dtype: torch.dtype, checkpoint: Checkpoint) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        return model
    except Exception as error:  # of settings that make no sense transformers raises whatever it stumbles over
        raise UnsupportedModelError(
            f"{checkpoint.folder}: cannot be built from its config: {first_line(error)}"
        ) from None


def _check_counts(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Raise FormatError for a config with more blocks or experts than there are tensors, before they are all built."""
    stored = len(checkpoint.specs)
    for name in _COUNTS:
        count = getattr(config.get_text_config(), name, 0)
        if isinstance(count, int) and count > stored:
            raise FormatError(f"{checkpoint.folder}: config.json says {name} {count}, the weights are {stored} tensors")


def _check_buffers(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise FormatError for a config that asks for more memory than the model's positions and heads account for."""
    needed = sum(buffer.nbytes for buffer in model.buffers())
    if needed > _MOST_BUFFERS:
        raise FormatError(
            f"{checkpoint.folder}: config.json asks for {needed} bytes of buffers besides the weights, at most "
            f"{_MOST_BUFFERS} are made; are its positions and head sizes right?"
        )


def load_model(
    model: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    swap: Callable[[str, nn.Linear], nn.Module] = lambda name, linear: linear,
) -> PreTrainedModel:
    """The whole model in memory, in eval mode.

    Args:
        model: Anything `resolve_model` takes, or an open checkpoint.
        dtype: Dtype of the weights; None keeps the checkpoint's.
        swap: Given each linear as soon as its tensors are in place, returns what stands there from then on; so a model
            takes another form while it is loaded, and is never in memory as a whole in its first.

    Raises: FormatError, UnsupportedModelError.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(resolve_model(str(model)))
    built = skeleton(checkpoint, dtype)
    special, missing = held_otherwise(built), set(built.state_dict())
    for name, stored in _largest_first(tensor_names(built, checkpoint), checkpoint):
        linear = special.get(name)
        if linear is not None and linear.expert is not None:
            place_expert_(linear, checkpoint.read(stored), dtype, device)
        else:
            place_(built, name, checkpoint.read(stored), dtype, device)
            _swap_if_whole_(built, name.rpartition(".")[0], swap)
        missing.discard(linear.parameter if linear else name)
    built.tie_weights(missing_keys=missing)  # not what is stored twice and differs
    built.to(device)  # buffers that are not stored
    _load_generation_config(built, checkpoint)
    return built


def _largest_first(names: dict[str, str], checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Modules in order of their size, the tensors of one together.

    What it takes to bring an output head into another form is then not added to a whole model.
    """
    specs, sizes = checkpoint.specs, dict[str, int]()
    for name, stored in names.items():
        owner = name.rpartition(".")[0]
        sizes[owner] = max(sizes.get(owner, 0), specs[stored].bytes)
    return sorted(names.items(), key=lambda item: -sizes[item[0].rpartition(".")[0]])


def place_(
    root: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Replace parameter or buffer ``name`` of ``root`` with ``tensor``. Changes ``root`` in place."""
    owner_name, _, leaf = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    value = tensor.to(device, dtype if tensor.is_floating_point() else None)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _swap_if_whole_(root: nn.Module, path: str, swap: Callable[[str, nn.Linear], nn.Module]) -> None:
    module = root.get_submodule(path)
    if isinstance(module, nn.Linear) and not any(parameter.is_meta for parameter in module.parameters()):
        owner, _, leaf = path.rpartition(".")
        if (other := swap(path, module)) is not module:
            setattr(root.get_submodule(owner), leaf, other)
            del module
            trim_heap()


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None if it carries none.

    Raises: FormatError if it carries one that cannot be read.
    """
    if not any((checkpoint.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no kind of its own
        raise FormatError(f"{checkpoint.folder}: tokenizer cannot be read: {first_line(error)}") from None


def _load_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    from transformers import GenerationConfig

    path = checkpoint.folder / "generation_config.json"
    if not path.exists():
        return
    if not isinstance(read_json(path), dict):
        raise FormatError(f"{path}: holds no mapping of settings")
    try:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    except Exception as error:  # as above
        raise FormatError(f"{path}: {first_line(error)}") from None
