"""What a training reads: text, or records of prompts and responses."""

from __future__ import annotations

import math
from pathlib import Path

from compressllm.core.errors import CalibrationError
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle
from compressllm.recover.config import RecoverConfig
from compressllm.recover.rows import TrainingData
from compressllm.recover.taskdata import load_tasks
from compressllm.recover.textdata import load_text

_HELD_OUT = 64  # windows at most
_SHARE = 0.4  # of the tokens trained on, all looks at them together: a tenth of the time, a look being a forward pass


def held_out_windows(config: RecoverConfig) -> int:
    """How many windows are held out at most, so that looking at them takes little of the time."""
    looks = math.ceil(1 / config.evaluate_every)
    return max(1, min(_HELD_OUT, int(_SHARE * config.max_tokens / looks / config.seqlen)))


def load_data(config: RecoverConfig, bundle: Bundle, run: Run, most: int | None = None) -> TrainingData:
    """The rows that settings name, for the bundle's tokenizer and vocabulary; warns of what was not done as asked.

    Args:
        most: Windows held out at most; `held_out_windows` unless given.

    Raises: RecipeError, CalibrationError.
    """
    tokens, longest, vocabulary = config.max_tokens, bundle.max_seqlen, bundle.vocab_size
    most = held_out_windows(config) if most is None else most
    if config.records:
        data = load_tasks(
            record_files(config), bundle.tokenizer, config.seqlen, config.record, config.held_out,
            most_held_out=most, max_tokens=tokens, max_seqlen=longest, vocab_size=vocabulary,
        )  # fmt: skip
    else:
        data = load_text(
            config.data, bundle.tokenizer, config.seqlen, config.mixture, config.held_out,
            most_held_out=most, max_tokens=tokens, max_seqlen=longest, vocab_size=vocabulary,
        )  # fmt: skip
    for note in data.notes:
        run.warn(note)
    return data


def record_files(config: RecoverConfig) -> list[Path]:
    """The files of records that settings name. Raises CalibrationError if one is not there."""
    paths = [Path(path).expanduser() for path in config.records]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise CalibrationError(f"records: {missing} does not exist, or is no file; give JSON lines of records")
    return paths
