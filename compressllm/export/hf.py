"""Let ``AutoModelForCausalLM.from_pretrained(folder, variant="packed")`` load what we packed, onto our kernels.

Importing this module registers it. It runs in the middle of transformers' own import, so nothing here may import a
model class, directly or through `compressllm.models`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressllm.core.detect import pattern_of
from compressllm.core.errors import FormatError
from compressllm.core.gathered import Gathered
from compressllm.core.heap import trim_heap
from compressllm.core.packedcodes import CODE_DTYPES, ORDER, SCALES, unpack_codes
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS, FORMATS, Format
from compressllm.core.quantized import QuantizedWeight, StoredCodes
from compressllm.core.registry import build
from compressllm.core.scheme import parse_scheme
from compressllm.core.stamp import QUANT_METHOD
from compressllm.kernels.linear import AUTO, PLAIN
from compressllm.kernels.measured import Timings, measuring
from compressllm.kernels.swapper import Swapper

_NO_READING_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"  # an environment variable of transformers


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a packed checkpoint.

    Given to ``from_pretrained`` as ``quantization_config`` it says how to run what was packed.

    Args:
        format: The name of the format the sparse linears are stored in; the checkpoint's own counts.
        backend: What runs the sparse linears: a backend's name, ``auto`` for the fastest that was measured on this
            machine, or ``dense``, which leaves plain modules that can be trained.
        keep_dense: Let ``auto`` keep a dense copy of a linear for prompts.
        scheme: What quantised weights are rounded to; of one that is dynamic no module stays plain.
    """

    dequantize = True  # the loaded model saves as a plain one: transformers then drops this config from it

    def __init__(
        self,
        format: str = "packed",
        backend: str = AUTO,
        keep_dense: bool = False,
        scheme: str | None = None,
        **other: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format, self.backend, self.keep_dense, self.scheme = format, backend, keep_dense, scheme
        self.__dict__.update(other)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of a config given by the user counts over the checkpoint's."""
        return {"backend": self.backend, "keep_dense": self.keep_dense}


# transformers takes these attributes from the kinds of config that it lists.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ()), PackedConfig)


@register_quantizer(QUANT_METHOD)
class PackedLoader(HfQuantizer):  # type: ignore[misc]
    """Brings packed linears into a backend's form while transformers loads them, one at a time."""

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._swaps = Swaps(quantization_config.backend, quantization_config.keep_dense)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to pack at load, and formats this version does not know."""
        if not self.pre_quantized:
            raise ValueError("compressllm packs at export: run `compressllm export MODEL OUT --format packed`")
        build(FORMATS, self.quantization_config.format)
        if self.quantization_config.backend != AUTO:
            build(BACKENDS, self.quantization_config.backend)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """One converter: the tensors of a packed linear -> its weight."""
        chosen: Format = build(FORMATS, self.quantization_config.format)
        parts = [
            _pattern(part) for part in (*_parts(chosen), ORDER) if part != "weight"
        ]  # that one has its name already
        scheme = self.quantization_config.scheme
        dynamic = scheme is not None and parse_scheme(scheme).dynamic
        return [WeightConverter(parts, ".weight", operations=[Unpack(chosen, self._swaps, dynamic)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own conversions, those that put experts together from packed ones; and ours."""
        chosen: Format = build(FORMATS, self.quantization_config.format)
        own = [_of_packed(one, chosen) if _joins_experts(one) else one for one in weight_conversions]
        return own + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """What is decoded here comes as it is stored: codes and scales would lose what they say in another dtype."""
        ours = any(isinstance(op, Unpack | UnpackExperts) for op in getattr(converter, "operations", ()))
        return None if ours else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Threads that read ahead would hold the whole file beside what is made of it. A load that fails does not come
        # to an end here, but this object does.
        self._allow_reading_ahead = weakref.finalize(self, _set, _NO_READING_AHEAD, os.environ.get(_NO_READING_AHEAD))
        _set(_NO_READING_AHEAD, "1")
        self._swaps.gathered = _gathered(model, kwargs.get("checkpoint_files") or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._allow_reading_ahead()
        self._swaps.install_(model)
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


class Swaps:
    """The modules made of packed linears during a load; they take their places when it is over.

    In between transformers fills every buffer that no checkpoint holds with anything, and theirs are such. A linear
    that waits has a weight of one element, repeated, so that it passes for loaded.

    Args:
        backend, keep_dense: As `PackedConfig` has them.

    Attributes:
        gathered: Linear name -> pattern, of those that have an order of inputs of their own.
    """

    gathered: Mapping[str, Gathered]

    def __init__(self, backend: str, keep_dense: bool) -> None:
        self._backend, self._keep_dense = backend, keep_dense
        self._made: dict[str, nn.Module] = {}
        self.gathered = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Swaps:
        return self  # transformers copies a conversion for every tensor

    def weight(
        self, name: str, linear: Any, weight: Tensor, keep: Tensor, codes: QuantizedWeight | None = None
    ) -> Tensor:
        """What transformers is to take for the weight of linear ``name``: the weight itself where it stays dense."""
        if not isinstance(linear, nn.Linear) or (self._backend == PLAIN and not (codes and codes.dynamic)):
            return weight
        pattern = self._pattern(name, keep)
        timings = Timings() if measuring() else None
        stored = {name: StoredCodes(codes.scheme, lambda: codes)} if codes else None
        swapper = Swapper(
            {name: keep}, {name: pattern}, self._backend, None, timings, self._keep_dense, quantized=stored
        )
        own = nn.Linear(1, 1, bias=False, device="meta")
        own.weight = nn.Parameter(weight, requires_grad=False)
        made = swapper(name, own)
        if made is own:
            return weight
        self._made[name] = made
        trim_heap()
        return weight.new_empty(1).expand(weight.shape)

    def _pattern(self, name: str, keep: Tensor) -> SparsityPattern:
        """What a mask obeys: in the order that is told of the linear, if that is so, or as it stands."""
        told = self.gathered.get(name)
        fits = told is not None and told.refuses(keep.shape) is None and not told.violations(keep)
        return told if told is not None and fits else pattern_of(keep)

    def install_(self, model: nn.Module) -> None:
        """Put them into the places of the linears they were made of, biases included. Changes ``model`` in place."""
        for name, made in self._made.items():
            linear: Any = model.get_submodule(name)
            made.register_parameter("bias", linear.bias)
            made.train(linear.training)
            if hook := getattr(linear, "_hf_hook", None):  # of a model that lies on several devices
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(made, hook)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, made)
        self._made.clear()


class Unpack(ConversionOps):  # type: ignore[misc]
    """The tensors of one packed linear -> its weight, in the dtype the model was asked for, or what stands for it."""

    def __init__(self, chosen: Format, swaps: Swaps, dynamic: bool) -> None:
        self._format, self._swaps, self._dynamic = chosen, swaps, dynamic

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
        keep = self._format.mask(linear, read, (out, columns))
        codes = None
        if keep is not None and input_dict.get(_pattern(SCALES)):
            ordered = bool(input_dict.get(_pattern(ORDER)))
            codes = unpack_codes(linear, read, keep, parameter.dtype, self._dynamic, ordered)
            weight = codes.dequantize()
        else:
            weight = self._format.unpack(linear, read, (out, columns)).to(parameter.dtype)
        if transposed:
            return {full_layer_name: weight.T.contiguous()}
        if keep is not None:
            weight = self._swaps.weight(linear, model.get_submodule(linear), weight, keep, codes)
        return {full_layer_name: weight}


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
            packed = {part: iter(input_dict.get(_beside(source, part), ())) for part in _parts(self._format)}
            weights = [tensor if tensor.numel() else self._next(packed, shape) for tensor in input_dict[source]]
            loaded[source] = [weight.to(parameter.dtype) for weight in weights]
        return loaded

    def _next(self, packed: dict[str, Iterator[Tensor]], shape: tuple[int, int]) -> Tensor:
        parts = {part: next(tensors, None) for part, tensors in packed.items() if part not in {"weight", SCALES}}

        def read(name: str) -> Tensor:
            if (tensor := parts[name.rpartition(".")[2]]) is None:
                raise FormatError(f"the checkpoint has too few tensors {name}")
            return tensor

        values, keep = parts["values"], self._format.mask("expert", read, shape)
        if values is None or keep is None or values.dtype not in CODE_DTYPES:
            return self._format.unpack("expert", read, shape)
        parts[SCALES] = next(packed[SCALES], None)  # only quantised experts have them
        return unpack_codes("expert", read, keep, torch.float32).dequantize()


def _gathered(model: Any, files: Sequence[str]) -> dict[str, Gathered]:
    """Linear name -> pattern, of those that ``compressllm.json`` beside a checkpoint's files gives an order."""
    from transformers.utils import cached_file

    from compressllm.models.facts import FILE_NAME, read_facts

    folder = Path(files[0]).parent if files else None
    if folder is None or not (folder / FILE_NAME).exists():  # of a model of the hub, which is asked for it
        found = cached_file(model.name_or_path, FILE_NAME, _raise_exceptions_for_missing_entries=False)
        folder = Path(found).parent if found else None
    facts = read_facts(folder) if folder else None
    patterns = facts.patterns if facts else {}
    return {name: pattern for name, pattern in patterns.items() if isinstance(pattern, Gathered)}


def _set(variable: str, value: str | None) -> None:
    """Set an environment variable, or remove it."""
    os.environ.pop(variable, None)
    if value is not None:
        os.environ[variable] = value


def _joins_experts(conversion: Any) -> bool:
    """Whether it makes one parameter of weights that are stored one an expert."""
    sources = getattr(conversion, "_original_source_patterns", ())
    return isinstance(conversion, WeightConverter) and all("*" in one and one.endswith(".weight") for one in sources)


def _of_packed(plain: WeightConverter, chosen: Format) -> WeightConverter:
    """The same conversion, collecting what experts are packed into as well, and decoding it first."""
    sources = [_beside(source, part) for source in plain._original_source_patterns for part in _parts(chosen)]
    operations = [UnpackExperts(chosen, plain), *plain.operations]
    return plain.copy(sources, list(plain._original_target_patterns), operations=operations)


def _parts(chosen: Format) -> tuple[str, ...]:
    return (*chosen.tensors, SCALES)


def _beside(source: str, part: str) -> str:
    return f"{source.removesuffix('.weight')}.{part}"


def _pattern(part: str) -> str:
    return rf"\.{part}$"
