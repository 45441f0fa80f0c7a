"""Windows given as token ids: a ``.npy`` array used exactly as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError
from compressllm.core.protocols import SOURCES, Split


@SOURCES.register("tokens")
@dataclass(frozen=True)
class TokenIds:
    """A .npy file of token ids (windows, seqlen), used exactly as given.

    Args:
        path: The file; any integer dtype.
    """

    path: Path

    def texts(self, split: Split) -> Iterator[str]:
        """Always raises CalibrationError: there is no text behind token ids."""
        raise CalibrationError(f"{self.path}: holds token ids; text is needed here")

    def read(self, vocab_size: int | None = None) -> Tensor:
        """The (n, seqlen) int64 ids.

        Args:
            vocab_size: Ids must lie below it; None leaves that unchecked.

        Raises: CalibrationError if the file is not such an array, is empty, or holds an id out of range.
        """
        ids = self._load()
        windows, seqlen = ids.shape
        if windows < 1 or seqlen < 2:
            raise CalibrationError(f"{self.path}: is {windows} x {seqlen} ids; a window of 2 tokens is the least")
        for extreme in (int(ids.min()), int(ids.max())):
            if extreme < 0 or (vocab_size is not None and extreme >= vocab_size):
                allowed = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
                raise CalibrationError(
                    f"{self.path}: holds token id {extreme}, ids must be {allowed}; "
                    "make the file with this model's tokenizer"
                )
        return torch.from_numpy(np.array(ids, dtype=np.int64, order="C"))

    def _load(self) -> np.ndarray[tuple[int, int], np.dtype[np.integer]]:
        try:
            # A pickle could run code. Mapped, so that a header that names more numbers than there are costs nothing.
            ids = np.load(self.path.expanduser(), mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise CalibrationError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # of a damaged header numpy lets whatever Python's parser raises through
            reason = str(error).partition("\n")[0]
            raise CalibrationError(f"{self.path}: is not a whole .npy file of numbers ({reason})") from None
        if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
            came = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "an archive of arrays"
            raise CalibrationError(f"{self.path}: is {came}; token ids are one 2-D integer array (windows, seqlen)")
        return ids
