"""Let ``AutoModelForCausalLM.from_pretrained(folder, variant="packed")`` load what we packed.

Importing this module registers it. It runs in the middle of transformers' own import, so nothing here may import a
model class, directly or through `compressllm.models`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressllm.core.errors import FormatError
from compressllm.core.protocols import FORMATS, Format
from compressllm.core.registry import build

QUANT_METHOD = "compressllm"  # the name in config.json under which transformers finds us


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a packed checkpoint.

    Args:
        format: The name of the format the sparse linears are stored in.
    """

    dequantize = True  # the loaded model is a plain one: transformers then drops this config from it

    def __init__(self, format: str, **other: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.format = format
        self.__dict__.update(other)


@register_quantizer(QUANT_METHOD)
class PackedLoader(HfQuantizer):  # type: ignore[misc]
    """Decodes packed linears while transformers loads them, one at a time; the model keeps its plain modules."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to pack at load, and formats this version does not know."""
        if not self.pre_quantized:
            raise ValueError("compressllm packs at export: run `compressllm export MODEL OUT --format packed`")
        build(FORMATS, self.quantization_config.format)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """One converter: the tensors of a packed linear -> its weight."""
        chosen: Format = build(FORMATS, self.quantization_config.format)
        parts = [_pattern(part) for part in chosen.tensors if part != "weight"]  # that one has its name already
        return [WeightConverter(parts, ".weight", operations=[Unpack(chosen)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own conversions, those that put experts together from packed ones; and ours."""
        chosen: Format = build(FORMATS, self.quantization_config.format)
        own = [_of_packed(one, chosen) if _joins_experts(one) else one for one in weight_conversions]
        return own + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # save_pretrained undoes the conversions noted here. The loaded weights are plain: of ours nothing is undone.
        noted: list[Any] = []
        for conversion in getattr(model, "_weight_conversions", None) or []:
            ours = [op for op in getattr(conversion, "operations", ()) if isinstance(op, Unpack | UnpackExperts)]
            noted += [op.plain for op in ours if isinstance(op, UnpackExperts)] if ours else [conversion]
        model._weight_conversions = noted
        return model

    def is_serializable(self) -> bool:
        """True: a loaded model is plain, and saved as such."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True, likewise; training does not keep the pruned weights at zero by itself."""
        return True


class Unpack(ConversionOps):  # type: ignore[misc]
    """The tensors of one packed linear -> its weight, in the dtype the model was asked for."""

    def __init__(self, chosen: Format) -> None:
        self._format = chosen

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Decode one weight. Raises FormatError, which transformers reports with the weight's name."""
        from transformers.pytorch_utils import Conv1D  # not while transformers itself is being imported

        linear = full_layer_name.removesuffix(".weight")
        parameter = model.get_parameter(full_layer_name)
        transposed = isinstance(model.get_submodule(linear), Conv1D)  # held as (in, out), packed as (out, in)

        def read(name: str) -> Tensor:
            part = name.removeprefix(f"{linear}.")
            if not (tensors := input_dict.get(_pattern(part))):
                raise FormatError(f"the checkpoint has no tensor {name}")
            return tensors[0]

        out, columns = reversed(parameter.shape) if transposed else parameter.shape
        weight = self._format.unpack(linear, read, (out, columns))
        return {full_layer_name: (weight.T.contiguous() if transposed else weight).to(parameter.dtype)}


class UnpackExperts(ConversionOps):  # type: ignore[misc]
    """The tensors of all experts, some or all of them packed -> their weights, for the conversion that joins them.

    Args:
        plain: What transformers does with experts that are not packed.
    """

    def __init__(self, chosen: Format, plain: WeightConverter) -> None:
        self._format, self.plain = chosen, plain

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Decode the experts of one parameter. Raises FormatError, which transformers reports with its name."""
        parameter = model.get_parameter(full_layer_name)  # (experts, rows, in); gate and up share the rows
        sources = self.plain._original_source_patterns
        shape = (parameter.shape[1] // len(sources), parameter.shape[2])
        loaded: dict[str, list[Tensor]] = {}
        for source in sources:
            # A packed linear's empty `weight` holds its place among those of experts that are not packed.
            packed = {part: iter(input_dict.get(_beside(source, part), ())) for part in self._format.tensors}
            weights = [tensor if tensor.numel() else self._next(packed, shape) for tensor in input_dict[source]]
            loaded[source] = [weight.to(parameter.dtype) for weight in weights]
        return loaded

    def _next(self, packed: dict[str, Iterator[Tensor]], shape: tuple[int, int]) -> Tensor:
        parts = {part: next(tensors, None) for part, tensors in packed.items() if part != "weight"}

        def read(name: str) -> Tensor:
            if (tensor := parts[name.rpartition(".")[2]]) is None:
                raise FormatError(f"the checkpoint has too few tensors {name}")
            return tensor

        return self._format.unpack("expert", read, shape)


def _joins_experts(conversion: Any) -> bool:
    """Whether it makes one parameter of weights that are stored one an expert."""
    sources = getattr(conversion, "_original_source_patterns", ())
    return isinstance(conversion, WeightConverter) and all("*" in one and one.endswith(".weight") for one in sources)


def _of_packed(plain: WeightConverter, chosen: Format) -> WeightConverter:
    """The same conversion, collecting what experts are packed into as well, and decoding it first."""
    sources = [_beside(source, part) for source in plain._original_source_patterns for part in chosen.tensors]
    operations = [UnpackExperts(chosen, plain), *plain.operations]
    return plain.copy(sources, list(plain._original_target_patterns), operations=operations)


def _beside(source: str, part: str) -> str:
    return f"{source.removesuffix('.weight')}.{part}"


def _pattern(part: str) -> str:
    return rf"\.{part}$"
