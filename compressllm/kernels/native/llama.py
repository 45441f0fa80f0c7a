"""A Llama's decoding step in C: one call takes a token through all decoder blocks, so that only linears take time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressllm.core.protocols import BACKENDS
from compressllm.core.registry import build
from compressllm.kernels.active import active_rows, c_function
from compressllm.kernels.linear import SparseLinear
from compressllm.kernels.native.library import library
from compressllm.kernels.native24 import Native

#: Architectures whose blocks are those of a Llama, biases of q, k and v apart.
ARCHITECTURES = ("llama", "mistral", "qwen2")
_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as c/kernel.h numbers them
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # the others depend on how long the text is

_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Weight(ctypes.Structure):  # as in c/decode.c, and so the next two
    _fields_ = (
        ("format", _POINTER), ("tile", _POINTER), ("blocks", _POINTER), ("bias", _POINTER), ("order", _POINTER),
        ("rows", _INTEGER), ("columns", _INTEGER),
    )  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _POINTER), ("mlp_norm", _POINTER),
        *((name, _Weight) for name in (*_ATTENTION, *_MLP)),
        ("keys", _POINTER), ("values", _POINTER),
    )  # fmt: skip


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)), ("last_norm", _POINTER),
        *((name, _INTEGER) for name in ("count", "hidden", "inner", "heads", "key_heads", "head_size", "length")),
        ("epsilon", _FLOAT), ("scale", _FLOAT), ("type", ctypes.c_int),
        ("active_rows", _POINTER), ("active_columns", _POINTER), ("index", _POINTER), ("memory", _POINTER),
        ("gathered", _POINTER),
    )  # fmt: skip


def refuses(model: Any) -> str | None:
    """Why the step cannot be made for a transformers model, or None."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        return f"is written for {', '.join(ARCHITECTURES)}, not for {config.model_type}"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        return "attends to all tokens, and this model slides a window over them"
    if config.hidden_act != "silu":
        return f"is written for silu, not for {config.hidden_act}"
    if (rotary := config.rope_parameters["rope_type"]) not in _FIXED_ROTARY:
        return f"is written for the rotary positions {', '.join(_FIXED_ROTARY)}, not for {rotary}"
    if (table := model.get_input_embeddings().weight).device.type != "cpu" or table.dtype not in _TYPES:
        return f"runs on CPUs in float32 and bfloat16, not on {table.device.type} in {table.dtype}"
    theirs, decoder = type(model).__module__, model.get_decoder()
    for name, module in decoder.layers.named_modules():
        if isinstance(module, SparseLinear):
            if not isinstance(build(BACKENDS, module.backend), Native):
                return f"{name} runs on {module.backend}, not on the native kernels of 2:4"
        elif isinstance(module, nn.Linear):
            return f"{name} is dense"
        elif type(module).__module__ not in {theirs, "transformers.activations", "torch.nn.modules.container"} | {
            "torch.nn.modules.activation"
        }:
            return f"{name} was replaced by a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name} has hooks, which would not be called"
    if c_function("active_rows") is None or c_function("active_columns") is None:
        return "has no kernel for attention here"
    return None


class LlamaStep:
    """What one token of one sequence adds: (1, 1) ids at a position -> (1, vocabulary) logits.

    Between the linears all is float32, where the model's own forward rounds to its dtype after every operator.

    Args:
        model: That `refuses` does not refuse; its weights are used where they lie.
        keys, values: For each block (1, key heads, length, head size), of one dtype; what came before is read there,
            and what the token adds is written there.
    """

    def __init__(self, model: Any, keys: list[Tensor], values: list[Tensor]) -> None:
        decoder, config = model.get_decoder(), model.config
        first = decoder.layers[0].self_attn
        _, key_heads, self._length, size = keys[0].shape
        heads, hidden = config.num_attention_heads, config.hidden_size
        inner, widest = config.intermediate_size, heads * size
        self._c = library().c
        self._table, self._head = model.get_input_embeddings().weight, model.get_output_embeddings()
        plain = type(self._head) is nn.Linear and self._head.bias is None and self._head.weight.dtype in _TYPES
        self._dense_head: Tensor | None = self._head.weight.detach() if plain else None
        positions = torch.arange(self._length).unsqueeze(0)
        cos, sin = decoder.rotary_emb(torch.empty(0), positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        self._index = index = torch.arange(max(self._length, self._head.out_features), dtype=torch.int32)
        memory = torch.empty(2 * (hidden + inner + widest + key_heads * size) + heads * self._length)
        gathered = torch.empty(max(hidden, inner, widest))
        self._held: list[object] = [memory, gathered, index, keys, values]  # all that the C side has addresses of
        blocks = (_Block * len(decoder.layers))()
        for block, layer, its_keys, its_values in zip(blocks, decoder.layers, keys, values, strict=True):
            block.attention_norm = self._float(layer.input_layernorm.weight)
            block.mlp_norm = self._float(layer.post_attention_layernorm.weight)
            for module, names in ((layer.self_attn, _ATTENTION), (layer.mlp, _MLP)):
                for name in names:
                    setattr(block, name, self._weight(getattr(module, f"{name}_proj")))
            block.keys, block.values = its_keys.data_ptr(), its_values.data_ptr()
        self._decoder = _Decoder(
            blocks, self._float(decoder.norm.weight), len(blocks), hidden, inner, heads, key_heads, size, self._length,
            config.rms_norm_eps, first.scaling, _TYPES[keys[0].dtype],
            c_function("active_rows"), c_function("active_columns"), index.data_ptr(), memory.data_ptr(),
            gathered.data_ptr(),
        )  # fmt: skip

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """The logits. Raises IndexError if the cache has no such position."""
        if not 0 <= position < self._length:
            raise IndexError(f"position {position} of a cache for {self._length} tokens")
        state = functional.embedding(ids.view(-1), self._table).float()
        cos, sin = (table.data_ptr() + position * table.stride(0) * 4 for table in (self._cos, self._sin))
        call = self._c.decode
        if call(ctypes.byref(self._decoder), *map(_POINTER, (state.data_ptr(), cos, sin)), _INTEGER(position)):
            raise MemoryError("no memory for the inputs of a linear")
        return self._logits(state.to(self._table.dtype))

    def _logits(self, state: Tensor) -> Tensor:
        if self._dense_head is not None:  # all rows are active
            return active_rows(state, self._dense_head, self._index[: len(self._dense_head)])
        logits: Tensor = self._head(state)
        return logits

    def _float(self, tensor: Tensor) -> int:
        """Address of the same in float32, which is kept."""
        wide = tensor.detach().float().contiguous()
        self._held.append(wide)
        return wide.data_ptr()

    def _weight(self, linear: SparseLinear) -> _Weight:
        backend: Any = build(BACKENDS, linear.backend)
        kernel, blocks = backend.kernel(linear.packed), linear.packed["blocks"]
        self._held.append(blocks)
        bias = None if linear.bias is None else self._float(linear.bias)
        order = None if linear.order is None else linear.order.int()
        self._held.append(order)
        return _Weight(
            kernel.format, kernel.tile, blocks.data_ptr(), bias, None if order is None else order.data_ptr(),
            linear.out_features, linear.in_features,
        )  # fmt: skip


def llama_step(model: Any, cache: Any) -> Callable[[Tensor, int], Tensor] | None:
    """The step for a model and its static cache, which has been filled by a prompt; None where there is none.

    Args:
        cache: transformers' StaticCache.
    """
    if refuses(model):
        return None
    keys, values = ([getattr(layer, part) for layer in cache.layers] for part in ("keys", "values"))
    alike = all(one.shape == other.shape and one.dtype == other.dtype for one, other in pairwise([*keys, *values]))
    if not alike or keys[0].shape[0] != 1 or keys[0].dtype not in _TYPES:
        return None
    return LlamaStep(model, keys, values)
