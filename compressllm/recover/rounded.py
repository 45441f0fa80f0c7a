"""Training with rounded weights: quantisation-aware, under masks that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressllm.core.errors import FormatError, TrainingError
from compressllm.core.gathered import Gathered
from compressllm.core.quantized import round_to_nearest
from compressllm.core.scheme import Scheme
from compressllm.recover.masking import MaskedWeight, Masking


class Rounded(Masking):
    """Masks that stay, and weights that the forward pass sees rounded to a scheme.

    The optimizer's weights are what is trained and written; their gradient is that of the rounded ones, straight
    through. Scales are those of `round_to_nearest`, chosen anew at every step and over kept weights, and zero is a
    code, so a pruned weight stays zero. What is rounded is the weight as it will be stored: `compressllm quantize` by
    ``rtn`` with the same scheme then makes of the checkpoint just the codes that the last step computed with.

    Args:
        weights: Parameter name -> its mask, of every linear that is to be rounded; one without a mask keeps all.
        scheme: What is rounded to.
        stored: Parameter name -> the dtype it is stored in.

    Source: sparse-distillation-aware training of GPUSQ-ViT, arXiv 2305.10727; straight-through estimator of Bengio et
        al., arXiv 1308.3432.
    """

    apart = True

    def __init__(self, weights: Mapping[str, MaskedWeight], scheme: Scheme, stored: Mapping[str, torch.dtype]) -> None:
        super().__init__(weights)
        self._scheme, self._stored = scheme, stored

    def forward_weight(self, name: str, weight: Tensor, step: int) -> Tensor:
        """The rounded weight, in float32."""
        one = self.weights[name]
        kept = weight.to(self._stored[name]).float()
        keep = one.keep
        if one.transposed:
            kept, keep = kept.T, keep.T
        columns = kept.shape[-1]  # experts of one tensor lie one above the other
        order = one.pattern.places if isinstance(one.pattern, Gathered) and keep.dim() == 2 else None
        try:
            rounded = round_to_nearest(kept.reshape(-1, columns), keep.reshape(-1, columns), self._scheme, order=order)
        except FormatError as error:
            raise TrainingError(f"{name}: {error}; training diverged, lower lr") from None
        left = rounded.dequantize(torch.float32).view(kept.shape)
        return left.T if one.transposed else left
