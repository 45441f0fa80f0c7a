"""Which tensor of a checkpoint is which of a model's."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from compressllm.core.errors import FormatError, UnsupportedModelError
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.experts import expert_weight
from compressllm.models.linears import held_otherwise


def tensor_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter or persistent buffer of the model -> name in the checkpoint.

    A parameter that holds all experts of a mixture is represented by the weights of its linears, one an expert, since
    that is how they are stored. Some checkpoints were saved from the base model and lack its prefix, or have it where
    the model does not; some go by names of before a module was renamed (GPT-NeoX's ``embed_out``).

    Raises: FormatError naming the first tensor that is missing or has another shape; UnsupportedModelError if the
        checkpoint keeps a tensor in another form than the model.
    """
    specs, current = checkpoint.specs, _current_names(model, checkpoint)
    tied = model.all_tied_weights_keys
    base = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for name, shape, parameter in _needed(model):
        found = _find(name, current, base)
        if found is None:
            if name in tied:
                continue
            if parameter != name and _find(parameter, current, base):
                raise UnsupportedModelError(
                    f"{checkpoint.folder}: stores all experts in one tensor, {parameter}; needed is one tensor "
                    "an expert, as save_pretrained writes most mixtures by default"
                )
            raise FormatError(f"{checkpoint.folder}: lacks tensor {name}, which {type(model).__name__} needs")
        if specs[found].shape != shape:
            raise FormatError(
                f"{checkpoint.folder}: {found} has shape {specs[found].shape}, config.json implies {shape}"
            )
        names[name] = found
    return names


def _needed(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and parameter of every tensor the model is made of; an expert's is a part of its parameter."""
    experts: dict[str, list[tuple[str, tuple[int, ...], str]]] = {}
    for name, linear in held_otherwise(model).items():
        if linear.expert is not None:
            experts.setdefault(linear.parameter, []).append((name, linear.shape, linear.parameter))
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield from experts.get(name) or [(name, tuple(tensor.shape), name)]


def _find(name: str, current: dict[str, str], base: str) -> str | None:
    """The stored name of what the model calls ``name``, with the base model's prefix or without."""
    return next((current[n] for n in (name, name.removeprefix(base), base + name) if n in current), None)


def _current_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The name transformers loads a tensor under -> its name in the checkpoint."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if not isinstance(one, WeightRenaming)]
    current: dict[str, str] = {}
    for name in sorted(checkpoint.specs):  # as transformers does: some renamings wait for an earlier name
        renamed, converted = rename_source_key(name, renamings, converters)
        if converted:
            converter = next(one for one in converters if converted in one.source_patterns)
            weight = expert_weight(name, renamed, converted, converter)
            if weight is None:
                raise UnsupportedModelError(
                    f"{checkpoint.folder}: {name} is stored in a form that {type(model).__name__} converts at load; "
                    "of these, only one tensor an expert is supported"
                )
            renamed = weight
        current[renamed] = name
    return current
