"""From what a user names (a registered text source, or a path) to a TextSource."""

from __future__ import annotations

from pathlib import Path

from compressllm.calibration.files import SUFFIXES, TextFile, text_suffix
from compressllm.calibration.tokenids import TokenIds
from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.core.protocols import SOURCES, TextSource
from compressllm.core.registry import Spec, build, did_you_mean, split_spec


def open_source(spec: Spec) -> TextSource:
    """The text source that ``spec`` names. Reads nothing yet, but finds out whether a file is there.

    Args:
        spec: A registered name, ``{name: {option: value}}``, or the path of a text file or of a ``.npy`` of token ids.

    Raises: RecipeError if it is none of these or an option is wrong, CalibrationError if the file does not exist.
    """
    name, _ = split_spec(spec, SOURCES.kind)
    known = SOURCES.names()
    if name in known:
        source = build(SOURCES, spec)
    elif isinstance(spec, str) and (_is_text(spec) or _is_ids(spec) or Path(spec).expanduser().exists()):
        source = TokenIds(Path(spec)) if _is_ids(spec) else TextFile(Path(spec))
    else:
        raise RecipeError(
            f"unknown {SOURCES.kind} {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}, "
            f"or a path to a file ending in {', '.join(SUFFIXES)} (or these with .gz), or .npy"
        )
    if isinstance(source, TextFile | TokenIds) and not (path := source.path.expanduser()).is_file():
        raise CalibrationError(f"{source.path}: {'is not a file' if path.exists() else 'does not exist'}")
    return source


def describe_source(spec: Spec) -> str:
    """How results name a source: ``wikitext2``, a path, or ``file(path=notes.jsonl, field=body)``."""
    name, options = split_spec(spec, SOURCES.kind)
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})" if options else name


def _is_text(path: str) -> bool:
    return text_suffix(Path(path)) in SUFFIXES


def _is_ids(path: str) -> bool:
    return path.lower().endswith(".npy")
