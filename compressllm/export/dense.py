"""Dense: zeros left in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.core.protocols import FORMATS


@FORMATS.register("dense")
@dataclass(frozen=True)
class Dense:
    """Zeros left in place: opens in any loader, saves nothing.

    The masks lie beside the weights, in ``masks.safetensors``, where no loader looks.
    """

    tensors: ClassVar[tuple[str, ...]] = ("weight",)

    def layout(self, name: str, dtype: torch.dtype, keep: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the weight."""
        return {f"{name}.weight": (dtype, tuple(keep.shape))}

    def pack(self, name: str, weight: Tensor, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The weight."""
        # Filled, not multiplied by the mask: a product leaves -0.0, which some readers take for a value.
        yield f"{name}.weight", raw(weight).masked_fill(~keep, 0).view(weight.dtype)

    def unpack(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight. Raises FormatError if it has another shape."""
        weight = read(f"{name}.weight")
        if tuple(weight.shape) != tuple(shape):
            raise FormatError(f"{name}: weight has shape {tuple(weight.shape)}, {tuple(shape)} is expected")
        return weight

    def mask(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor | None:
        """None: zeros do not tell, since a kept weight may be zero too."""
        return None
