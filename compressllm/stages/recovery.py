"""The recover stage: choose the records to train on and correct the teacher, if settings say so, then train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from compressllm.core.errors import CalibrationError, FormatError
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.shards import file_sha256
from compressllm.recover.config import RecoverConfig
from compressllm.recover.conversation import encode_all
from compressllm.recover.data import record_files
from compressllm.recover.model import recover_model
from compressllm.recover.records import Message, Tally, read_records
from compressllm.select.config import ChoiceConfig, SelectConfig
from compressllm.select.records import Record
from compressllm.select.selection import select_records
from compressllm.stages.correction import corrected_teacher
from compressllm.stages.recoverconfig import RecoverStageConfig
from compressllm.stages.selection import write_selection

#: What the choice leaves in the stage's folder, with ``chosen.report.json`` and pictures beside it.
CHOSEN: Final = "chosen.jsonl"


def recover_stage(bundle: Bundle, config: RecoverStageConfig, run: Run) -> Bundle:
    """Train the bundle as `recover_model` does, on the records that ``config.select`` chooses if it is there.

    With ``config.teacher_tokens`` the teacher is trained first.

    Raises: as `recover_model` and `select_records`; FormatError if there is no folder to keep the choice in.
    """
    if config.select is None:
        return _train(bundle, config, config.training(), run)
    if run.folder is None:
        raise FormatError("select: the chosen records are kept in a file; give the run a folder")
    folder, choice = run.folder.absolute(), config.select  # processes may know it by different names
    report = run.ranks.first_then_rest(lambda: _choose(bundle, config, choice, folder / CHOSEN, run))
    told = ("records", "budget", "chosen", "tokens", "chosen_tokens")
    run.metrics["selection"] = {"method": choice.method, **{name: report[name] for name in told}}
    return _train(bundle, config, config.training(records=(str(folder / CHOSEN),)), run)


def _train(bundle: Bundle, config: RecoverStageConfig, training: RecoverConfig, run: Run) -> Bundle:
    if config.teacher_tokens is None:
        return recover_model(bundle, training, run)
    teacher = corrected_teacher(config, training, run)
    return recover_model(bundle, training.model_copy(update={"teacher": teacher}), run)


def _choose(bundle: Bundle, config: RecoverStageConfig, choice: ChoiceConfig, out: Path, run: Run) -> dict[str, Any]:
    """Write the chosen records to ``out``, unless a run that was stopped has; the report on them."""
    files = record_files(config)
    made_of = {
        "select": choice.model_dump(mode="json"),
        "seed": run.seed,
        "seqlen": config.seqlen,
        "teacher": config.teacher,
        "record": config.record.model_dump(mode="json"),
        "records": {str(file): file_sha256(file) for file in files},
        "masks": bundle.masks.sha256() if bundle.masks else None,
    }
    kept = out.with_suffix(".report.json")
    if out.exists() and kept.exists():
        report: dict[str, Any] = json.loads(kept.read_text())
        if report.get("made_of") == made_of:
            return report
    records, tally = _readable(files, bundle, config)
    if tally.unused:
        run.warn(f"select: records left out before any was chosen: {tally}")
    settings = SelectConfig(
        method=choice.method, budget=choice.budget, max_tokens=max(8, config.seqlen), device=config.device,
        dtype=config.dtype,
    )  # fmt: skip
    dense = open_bundle(config.teacher) if config.teacher else bundle
    selection = select_records(records, dense, bundle, settings, run)
    report = {"schema": 1, "made_of": made_of, "left_out": tally.facts()["unused"], **selection.report}
    write_selection(selection, out, report, run.seed)
    return report


def _readable(files: list[Path], bundle: Bundle, config: RecoverStageConfig) -> tuple[list[Record], Tally]:
    """What training can use of some files, each once: a choice of what it would leave out again would be wasted."""
    if bundle.tokenizer is None:
        raise CalibrationError(f"{files[0]}: the model has no tokenizer; records of text need one")
    tally = Tally()
    read = [one for file in files for one in read_records(file, config.record, tally)]
    records: list[Record] = []
    seen: set[tuple[tuple[str, str], ...]] = set()
    encoded = encode_all([messages for _, messages in read], bundle.tokenizer)
    for (where, messages), tokens in zip(read, encoded, strict=True):
        turns = tuple((message["role"], message["content"]) for message in messages)
        if isinstance(tokens, str):
            tally.leave_out(tokens, where)
        elif len(tokens.ids) > config.seqlen and config.record.over_length == "drop":
            tally.leave_out(f"longer than {config.seqlen} tokens", where)
        elif turns in seen:
            tally.leave_out("repeated", where)
        else:
            seen.add(turns)
            records.append(_record(where, messages, config.record.messages))
    if not records:
        raise CalibrationError(f"{', '.join(map(str, files))}: no record can be used: {tally or 'there is none'}")
    return records, tally


def _record(where: str, messages: list[Message], name: str) -> Record:
    """A conversation as something to choose, which is written as training reads it back."""
    turns = tuple((message["role"], message["content"]) for message in messages)
    line = int(where.rpartition(":")[2])
    return Record(turns[:-1], turns[-1][1], {name: messages, "from": where}, line)
