"""Scheme: the grid that weights are rounded to, and how many of them share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.registry import did_you_mean

#: The names `parse_scheme` knows.
SchemeName = Literal["int8", "int8-dynamic", "int4-g32", "int4-g64", "int4-g128", "fp8", "fp8-dynamic"]

#: Bits of an integer code -> the largest magnitude a symmetric quantiser uses.
LARGEST = {8: 127, 4: 7}
_LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn
_SMALLEST_SCALE = 2.0**-24  # of float16, in which scales are stored


@dataclass(frozen=True)
class Scheme:
    """A symmetric grid: a weight is a code times the scale of its group, and zero is code 0.

    Scales are numbers that both float16 and bfloat16 hold, in float32: whatever dtype a loader keeps them in, the
    weights are the same. Those of float8 codes are powers of two, so that a weight is exact in any dtype that has
    float8's three bits and the range.

    Args:
        bits: 8 or 4.
        group: Consecutive inputs of a row that share a scale; None for all of them.
        float8: Codes are float8_e4m3fn in place of integers.
        dynamic: What the linear is given is rounded too, each token by a scale of its own, see `round_tokens`.

    Raises: FormatError for other bits.
    """

    bits: int
    group: int | None = None
    float8: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in LARGEST:
            raise FormatError(f"quantisation to {self.bits} bits; 8 and 4 are supported")

    def __str__(self) -> str:
        weights = "fp8" if self.float8 else f"int{self.bits}" + (f"-g{self.group}" if self.group else "")
        return f"{weights}-dynamic" if self.dynamic else weights

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the codes."""
        return torch.float8_e4m3fn if self.float8 else torch.int8

    def width(self, columns: int) -> int:
        """Inputs that share a scale in a row of so many."""
        return min(self.group or columns, columns)

    def scale(self, kept: Tensor) -> Tensor:
        """The scale of each group: (..., group) float32, 0 where pruned, -> (...) float32.

        The largest weight of a group gets the largest code; of float8, a code above half of it. A group too small for
        float16 to scale is scaled by its smallest number.

        Raises: FormatError if a scale is too large for float16, or not finite.
        """
        largest = kept.abs().amax(-1)
        if self.float8:
            part, exponent = torch.frexp(largest / _LARGEST_FLOAT8)  # part * 2^exponent, 0.5 <= part < 1
            scales = torch.ldexp(torch.ones_like(largest), exponent - (part == 0.5).int())
            scales = torch.where((largest > 0) & largest.isfinite(), scales, largest)
        else:
            scales = largest / LARGEST[self.bits]
        scales = self.rounded_scale(scales)
        if not scales.isfinite().all():
            raise FormatError(f"weights as large as {largest.max():g} or not finite; scales of {self} are float16")
        return scales

    def rounded_scale(self, scales: Tensor) -> Tensor:
        """The nearest scales that can be stored, infinite where there is none; never 0, so that 0 / scale is 0."""
        return scales.bfloat16().half().float().clamp(min=_SMALLEST_SCALE)

    def code(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest code of each weight, as float32; ``scale`` broadcasts against ``weight``."""
        scaled = weight / scale
        if self.float8:
            return scaled.clamp_(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(self.dtype).float()
        return scaled.round_().clamp_(-LARGEST[self.bits], LARGEST[self.bits])

    def round_tokens(self, x: Tensor) -> Tensor:
        """What codes of 8 bits and one scale a token leave of a linear's inputs: (..., in) -> (..., in), same dtype.

        The largest input of a token gets the largest code. Scales are float32 and found anew for every token.
        """
        wide = x.float()
        largest = wide.abs().amax(-1, keepdim=True)
        scale = largest / (_LARGEST_FLOAT8 if self.float8 else LARGEST[8])
        scale = scale.masked_fill(scale == 0.0, 1.0)  # a token of zeros
        return (self.code(wide, scale) * scale).to(x.dtype)


_KNOWN = {
    "int8": Scheme(8),
    "int8-dynamic": Scheme(8, dynamic=True),
    "int4-g32": Scheme(4, 32),
    "int4-g64": Scheme(4, 64),
    "int4-g128": Scheme(4, 128),
    "fp8": Scheme(8, float8=True),
    "fp8-dynamic": Scheme(8, float8=True, dynamic=True),
}


def parse_scheme(text: str) -> Scheme:
    """The scheme of a name; ``str(parse_scheme(name)) == name``. Raises RecipeError with the nearest name."""
    if text not in _KNOWN:
        raise RecipeError(
            f"unknown scheme {text!r}{did_you_mean(text, _KNOWN)} Known: {', '.join(get_args(SchemeName))}"
        )
    return _KNOWN[text]
