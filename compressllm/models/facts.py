"""``compressllm.json``: what we know of a checkpoint folder we wrote, in a file no loader interprets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from compressllm import __version__
from compressllm.core.errors import CompressError, FormatError
from compressllm.core.gathered import Gathered
from compressllm.core.pattern import NM, SparsityPattern, parse_pattern
from compressllm.core.scheme import SchemeName
from compressllm.models.seal import FACTS_NAME, seal
from compressllm.models.shards import file_sha256
from compressllm.models.sidefiles import inside

FILE_NAME = FACTS_NAME


def _pattern(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"gathered", "order"}:
        base = _pattern(value["gathered"])
        try:
            if isinstance(base, NM) and isinstance(value["order"], str):
                return Gathered.read(base, value["order"])
        except CompressError as error:
            raise ValueError(str(error)) from None
    if not isinstance(value, str | SparsityPattern):
        raise ValueError(f"{value!r} is no pattern")
    return parse_pattern(value)


def _written(pattern: SparsityPattern) -> str | dict[str, str]:
    if isinstance(pattern, Gathered):
        return {"gathered": str(pattern.base), "order": pattern.order_text}
    return str(pattern)


#: A pattern as `parse_pattern` reads it; of a gathered one also its order.
Pattern = Annotated[Any, BeforeValidator(_pattern), PlainSerializer(_written)]


class LinearFacts(BaseModel):
    """One sparse linear.

    Args:
        pattern: What its mask obeys.
        shape: (out, in).
        transposed: Whether the plain weight is stored as (in, out), as GPT-2's are; mask and packed form are
            (out, in) all the same. Written only if true.
        scheme: What its weights are rounded to, ``int4-g128`` say; None if they are not, and then not written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: Pattern
    shape: tuple[int, int]
    transposed: bool = False
    scheme: SchemeName | None = None

    @model_validator(mode="after")
    def _order_fits(self) -> LinearFacts:
        if isinstance(self.pattern, Gathered) and (reason := self.pattern.refuses(self.shape)):
            raise ValueError(reason)
        return self

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the plain weight as it is stored."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return {key: value for key, value in written.items() if value or key not in {"transposed", "scheme"}}


class Facts(BaseModel):
    """Contents of ``compressllm.json``.

    Args:
        version: Version of this file's schema.
        written_by: Version of compressllm.
        format: How sparse linears lie on disk: ``dense`` or a packed format's name.
        variant: The variant in the shards' names, None for plain names.
        linears: Linear name -> pattern and shape, of the linears that are sparse.
        masks_sha256: Hash of all masks (`MaskStore.sha256`).
        source: Where the weights came from.
        sha256: File name -> hash, of every weight file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    written_by: str
    format: str = "dense"
    variant: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    linears: dict[str, LinearFacts] = {}
    masks_sha256: str | None = None
    source: dict[str, Any] = {}
    sha256: dict[str, str] = {}

    @property
    def patterns(self) -> dict[str, SparsityPattern]:
        """Linear name -> pattern."""
        return {name: linear.pattern for name, linear in self.linears.items()}

    @property
    def schemes(self) -> dict[str, str]:
        """Linear name -> scheme, of the quantised ones."""
        return {name: linear.scheme for name, linear in self.linears.items() if linear.scheme}

    def write(self, folder: Path) -> None:
        """Write ``compressllm.json`` into ``folder``, and then the hashes of all files that are in it."""
        (folder / FILE_NAME).write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")
        seal(folder, self.sha256)


def write_dense_facts(folder: Path, source: Mapping[str, Any]) -> None:
    """Write the facts of a checkpoint without sparse linears, whose weight files are all in ``folder`` already.

    Args:
        source: Where the weights came from.
    """
    files = sorted(folder.glob("*.safetensors"))
    hashes = {path.name: file_sha256(path) for path in files}
    Facts(written_by=__version__, source=dict(source), sha256=hashes).write(folder)


def read_facts(folder: Path) -> Facts | None:
    """The facts of a folder we wrote, or None of one we did not.

    Raises: FormatError if the file is there and damaged, or is none.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        return Facts.model_validate_json(inside(folder, FILE_NAME).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; export the model again"
        ) from None
