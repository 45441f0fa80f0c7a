"""select_records: the choice itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.core.protocols import SELECTORS, Chosen
from compressllm.core.registry import build, split_spec
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle
from compressllm.select.config import SelectConfig
from compressllm.select.pool import Pool
from compressllm.select.records import Record


@dataclass(frozen=True)
class Selection:
    """Records that were chosen, in the order in which to use them.

    Args:
        records: The records.
        chosen: Their places in what they were chosen from, with scores and clusters.
        tokens: Tokens of each, prompt and response.
        report: What the choice rests on, as plain data.
    """

    records: list[Record]
    chosen: Chosen
    tokens: list[int]
    report: dict[str, Any]


def select_records(
    records: Sequence[Record], teacher: Bundle, student: Bundle | None, config: SelectConfig, run: Run
) -> Selection:
    """Choose the records that recovery training learns from.

    Embeddings and divergences are kept by content in the cache folder, so a call that was killed goes on where it was,
    to the same choice.

    Args:
        teacher: The dense model, whose tokenizer reads the records.
        student: The pruned model; may be None for a method that does not look at it.

    Raises: CalibrationError without records; RecipeError, FormatError as the method needs.
    """
    if not records:
        raise CalibrationError("there are no records to choose from")
    selector = build(SELECTORS, config.method, {"seed": run.seed})
    if selector.needs_student and student is None:
        name = split_spec(config.method, SELECTORS.kind)[0]
        raise RecipeError(
            f"selector {name} compares the pruned model with the dense one; give the pruned one as student"
        )
    pool = Pool(records, teacher, student, config, run)
    budget = config.records_of(len(records))
    chosen = selector.select(pool, budget, run)
    tokens = [int(pool.lengths[one]) for one in chosen.ids]
    shortened = sum(not one.whole for one in pool.encoded)
    report = {
        "records": len(records),
        "tokens": int(pool.lengths.sum()),
        "shortened": shortened,
        "budget": budget,
        "chosen": len(chosen.ids),
        "chosen_tokens": sum(tokens),
        **chosen.notes,
    }
    return Selection([records[one] for one in chosen.ids], chosen, tokens, report)
