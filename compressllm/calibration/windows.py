"""Token windows of one length, unpadded: what methods are calibrated on, and what perplexity is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressllm.calibration.config import CalibrationConfig
from compressllm.calibration.cutting import calibration_windows, special_tokens, stream_windows
from compressllm.calibration.source import describe_source, open_source
from compressllm.calibration.tokenids import TokenIds
from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.core.registry import Spec
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle

if TYPE_CHECKING:
    from hashlib import _Hash

#: How windows were made: ``crops`` of long documents, cut from ``packed`` ones or from one ``stream``, or ``given``.
WindowProtocol = Literal["crops", "packed", "stream", "given"]

CALIBRATION_SAMPLES: Final = 128  # with 2048 tokens each, the default of SparseGPT, Wanda and all after them
CALIBRATION_SEQLEN: Final = 2048
EVALUATION_SEQLEN: Final = 1024


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of one length, and where they came from.

    Args:
        ids: (n, seqlen) int64.
        source: The text source, as results name it.
        protocol: How the windows were made.
        special_tokens: What the tokenizer adds to a text, for example ``<s>``; empty if nothing, or not known.
        text_sha256: Hash of all the source's texts joined by two newlines; None for given ids.
        available: How many there are, where ``ids`` are the first of them.
        note: What was done instead of the usual protocol, in one line, to be warned of and recorded.
    """

    ids: Tensor
    source: str
    protocol: WindowProtocol
    special_tokens: str = ""
    text_sha256: str | None = None
    available: int | None = None
    note: str | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return self.ids.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the ids with their shape, the same on every machine."""
        digest = hashlib.sha256(f"{len(self)} {self.seqlen}\n".encode())
        digest.update(self.ids.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def rule(self) -> str:
        """One line that says what the windows are, to stand beside every number measured on them."""
        special = f"special tokens {self.special_tokens}" if self.special_tokens else "no special tokens"
        how = {
            "crops": f"one random crop a document, {special}",
            "packed": f"cut at random from all documents packed, {special}",
            "stream": f"end to end, texts joined by two newlines and tokenised once, {special}",
            "given": "token ids as given",
        }[self.protocol]
        count = f"{len(self)}" if self.available in (None, len(self)) else f"first {len(self)} of {self.available}"
        return f"{self.source}, {count} windows of {self.seqlen} tokens, {how}"

    def facts(self) -> dict[str, Any]:
        """All but the ids, for the manifest."""
        return {
            "source": self.source,
            "protocol": self.protocol,
            "windows": len(self),
            "seqlen": self.seqlen,
            "special_tokens": self.special_tokens,
            "ids_sha256": self.sha256,
            "text_sha256": self.text_sha256,
            "note": self.note,
        }


def load_windows(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    *,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
) -> Windows:
    """Windows to calibrate on, from anything `open_source` takes; token ids are used exactly as given.

    Args:
        tokenizer: The model's; None will do for token ids.
        samples: Number of windows; None means 128, or all that a file of token ids holds.
        seqlen: Tokens in a window; None means the smaller of 2048 and ``max_seqlen``, or what the file holds.
        seed: Fixes which windows are drawn.
        max_seqlen: The longest window the model takes, if there is a limit.
        vocab_size: Token ids given must lie below it; None leaves that unchecked.

    Raises: RecipeError for a spec or option that makes no sense; CalibrationError for text that cannot be had or
        is too short, for token ids that contradict an option, and for windows longer than the model takes.
    """
    _check_options(samples, seqlen)
    name, source = describe_source(spec), open_source(spec)
    if isinstance(source, TokenIds):
        ids = source.read(vocab_size)
        if samples not in (None, len(ids)):
            raise CalibrationError(f"{name}: holds {len(ids)} windows, samples says {samples}; leave samples out")
        return Windows(_checked(ids, name, seqlen, max_seqlen), name, "given")
    length, tokenizer = _text_options(seqlen, CALIBRATION_SEQLEN, max_seqlen, tokenizer, name)
    digest = hashlib.sha256()
    texts = _hashed(source.texts("calibration"), digest)
    ids, protocol, note = calibration_windows(texts, tokenizer, samples or CALIBRATION_SAMPLES, length, seed, name)
    return Windows(ids, name, protocol, special_tokens(tokenizer), digest.hexdigest(), note=note)


def windows_for(bundle: Bundle, calibration: CalibrationConfig, run: Run) -> Windows:
    """The windows a stage calibrates ``bundle`` on; warns of what was not done as usual.

    Raises: as `load_windows`.
    """
    windows = load_windows(
        calibration.source,
        bundle.tokenizer,
        samples=calibration.samples,
        seqlen=calibration.seqlen,
        seed=run.seed,
        max_seqlen=bundle.max_seqlen,
        vocab_size=bundle.vocab_size,
    )
    if windows.note:
        run.warn(windows.note)
    return windows


def evaluation_windows(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int | None = None,
    limit: int | None = None,
    *,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
) -> Windows:
    """Windows to measure perplexity on: all texts joined, tokenised once and cut end to end, as `stream_windows` says.

    Args:
        tokenizer: The model's; None will do for token ids.
        seqlen: Tokens in a window; None means the smaller of 1024 and ``max_seqlen``, or what the file holds.
        limit: At most so many windows, the first ones; None means all.
        max_seqlen: The longest window the model takes, if there is a limit.
        vocab_size: Token ids given must lie below it; None leaves that unchecked.

    Raises: as `load_windows`.
    """
    _check_options(limit, seqlen)
    name, source = describe_source(spec), open_source(spec)
    if isinstance(source, TokenIds):
        ids = _checked(source.read(vocab_size), name, seqlen, max_seqlen)
        return Windows(ids[:limit].clone(), name, "given", available=len(ids))
    length, tokenizer = _text_options(seqlen, EVALUATION_SEQLEN, max_seqlen, tokenizer, name)
    digest = hashlib.sha256()
    ids = stream_windows(_hashed(source.texts("evaluation"), digest), tokenizer, length, name)
    special = special_tokens(tokenizer)
    return Windows(ids[:limit].clone(), name, "stream", special, digest.hexdigest(), available=len(ids))


def _check_options(count: int | None, seqlen: int | None) -> None:
    if count is not None and count < 1:
        raise RecipeError(f"got {count} windows; at least 1 is needed")
    if seqlen is not None and seqlen < 2:
        raise RecipeError(f"got seqlen {seqlen}; at least 2 is needed")


def _checked(ids: Tensor, name: str, seqlen: int | None, max_seqlen: int | None) -> Tensor:
    held = ids.shape[1]
    if seqlen not in (None, held):
        raise CalibrationError(f"{name}: holds windows of {held} tokens, seqlen says {seqlen}; leave seqlen out")
    if max_seqlen is not None and held > max_seqlen:
        raise CalibrationError(f"{name}: holds windows of {held} tokens, the model takes at most {max_seqlen}")
    return ids


def _text_options(
    seqlen: int | None, default: int, max_seqlen: int | None, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> tuple[int, PreTrainedTokenizerBase]:
    if tokenizer is None:
        raise CalibrationError(f"{name}: the model has no tokenizer; give windows of token ids as a .npy file")
    if seqlen is not None and max_seqlen is not None and seqlen > max_seqlen:
        raise CalibrationError(f"seqlen {seqlen} is more than the {max_seqlen} tokens that the model takes")
    return seqlen or min(default, max_seqlen or default), tokenizer


def _hashed(texts: Iterable[str], digest: _Hash) -> Iterator[str]:
    """Pass texts on, and count them into ``digest`` as if joined by two newlines."""
    between = b""
    for text in texts:
        digest.update(between + text.encode())
        between = b"\n\n"
        yield text
