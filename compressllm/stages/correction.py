"""A teacher that is trained on what it is to teach from, before it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from compressllm.core.atomic import write_json
from compressllm.core.errors import FormatError
from compressllm.core.run import TEACHER, Run, read_journal
from compressllm.models.bundle import open_bundle
from compressllm.recover.config import RecoverConfig
from compressllm.recover.data import held_out_windows
from compressllm.recover.model import recover_model
from compressllm.stages.recoverconfig import RecoverStageConfig

_DONE: Final = "corrected.json"


def corrected_teacher(config: RecoverStageConfig, training: RecoverConfig, run: Run) -> str:
    """Train the dense teacher on the text alone, with the student's data; where the result is.

    A stopped run goes on where it was, in the teacher's training or after it. The folder goes with the stage's
    journal.

    Args:
        config: Says for how many tokens, and how fast.
        training: The student's settings.

    Raises: as `recover_model`; FormatError if there is no folder to keep the teacher in; RunError if what a stopped run
        left is damaged.

    Source: teacher correction, arXiv 2408.11796.
    """
    if run.folder is None:
        raise FormatError("teacher_tokens: the corrected teacher is kept in a file; give the run a folder")
    folder, settings = run.folder.absolute() / TEACHER, config.correction(training)
    folder.mkdir(exist_ok=True)
    held_out = held_out_windows(training)  # what the student is judged by, its teacher is not to have seen either
    made_of = {
        "teacher": training.teacher,
        "settings": settings.model_dump(mode="json"),
        "held_out": held_out,
        "seed": run.seed,
    }
    facts = run.ranks.exchange(_finished(folder, made_of))[0]
    if facts is None:
        facts = _correct(settings, folder, made_of, run)
    run.metrics["correction"] = facts
    return str(folder / "model")


def _correct(settings: RecoverConfig, folder: Path, made_of: dict[str, Any], run: Run) -> dict[str, Any]:
    later: list[Callable[[], None]] = []
    work = Run(
        run.seed, folder, run.show, lambda message: run.warn(f"correcting the teacher: {message}"),
        ranks=run.ranks, defer=later.append,
    )  # fmt: skip
    recover_model(open_bundle(made_of["teacher"]), settings, work, held_out=made_of["held_out"])
    told = ("tokens", "training_seconds", "held_out_perplexity")
    facts = {"lr": settings.lr, **{name: work.metrics[name] for name in told}}
    if run.ranks.rank == 0:
        write_json(folder / _DONE, {"made_of": made_of, "facts": facts})
    for clean in later:
        clean()
    return facts


def _finished(folder: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """What was told of the teacher, if a run that was stopped had finished it."""
    if not (folder / _DONE).exists():
        return None
    found = read_journal(folder / _DONE, {"made_of", "facts"})
    return dict(found["facts"]) if found["made_of"] == json.loads(json.dumps(made_of)) else None
