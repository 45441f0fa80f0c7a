"""What few neurons cost, and what correction brings back: the numbers of one density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressllm.contextual.attach import Contextual
from compressllm.contextual.density import effective_density, expected_advance, param_density, read_density
from compressllm.contextual.fidelity import DENSE, Texts, generate_all, likeness, prompts_of
from compressllm.contextual.probes import Answers, Item, answer_items, probe_facts, recovery
from compressllm.contextual.scoring import score_windows
from compressllm.core.protocols import Corrector
from compressllm.core.run import Run


@dataclass(frozen=True)
class Trial:
    """What is measured on.

    Args:
        windows: (n, seqlen) token ids: each is scored, and its beginning is a prompt.
        prompt_tokens: Length of those prompts.
        new_tokens: Tokens to generate after each.
        items: Questions; none without a tokenizer.
    """

    windows: Tensor
    prompt_tokens: int
    new_tokens: int
    items: Sequence[Item] = ()


@dataclass(frozen=True)
class Reference:
    """The dense model on a trial, through the same loop."""

    texts: Texts
    answers: Answers | None

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"texts": self.texts.facts(), "probes": probe_facts(self.answers) if self.answers else None}


def measure_dense(contextual: Contextual, tokenizer: PreTrainedTokenizerBase | None, trial: Trial) -> Reference:
    """Generate by all neurons."""
    prompts = prompts_of(trial.windows.to(contextual.model.device), trial.prompt_tokens)
    texts = generate_all(contextual, prompts, trial.new_tokens, DENSE)
    answers = answer_items(contextual, tokenizer, trial.items, DENSE) if tokenizer and trial.items else None
    return Reference(texts, answers)


def measure_density(
    contextual: Contextual,
    tokenizer: PreTrainedTokenizerBase | None,
    trial: Trial,
    reference: Reference,
    corrector: Corrector | None,
    run: Run | None = None,
) -> dict[str, Any]:
    """One point of the trade-off: a density without correction and, if there is a corrector, with it."""
    run = run or Run()
    windows = trial.windows.to(contextual.model.device)
    prompts = prompts_of(windows, trial.prompt_tokens)
    scored = score_windows(contextual, windows, trial.prompt_tokens, corrector)
    point: dict[str, Any] = {
        "density": contextual.density,
        "read_density": read_density(contextual, planned=True),
        "param_density": param_density(contextual),
        "scored": scored.as_json(),
    }
    kinds = {"sparse": None} | ({"corrected": corrector} if corrector else {})
    for kind, by in run.track(list(kinds.items()), len(kinds), f"density {contextual.density}"):
        texts = generate_all(contextual, prompts, trial.new_tokens, by)
        made = texts.facts() | likeness(texts.tokens, reference.texts.tokens)
        dense_speed = reference.texts.facts()["tokens_per_second"]
        speed = made["tokens_per_second"]
        made["speed_ratio"] = speed / dense_speed if speed and dense_speed else None
        if reference.answers is not None and tokenizer is not None:
            made["probes"] = probe_facts(answer_items(contextual, tokenizer, trial.items, by))
        point[kind] = made
    if corrector:
        _predict(point, corrector, scored.stands)
        if reference.answers is not None:
            dense = reference.answers.accuracy()["all"]
            after = [point[kind]["probes"]["accuracy"]["all"] for kind in ("sparse", "corrected")]
            point["recovery"] = recovery(dense, *after)
    return point


def _predict(point: dict[str, Any], corrector: Corrector, stands: float | None) -> None:
    """Beside what was counted, what the published formula makes of the period and of how many guesses stand."""
    made, read = point["corrected"], point["read_density"]
    if made["advance_length"]:
        made["effective_density_formula"] = effective_density(corrector.period, read, made["advance_length"])
    if stands is not None:
        made["advance_length_expected"] = advance = expected_advance(stands, corrector.period)
        made["effective_density_expected"] = effective_density(corrector.period, read, advance)


def tradeoff(reference: Reference, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a curve: quality against effective density, of the dense model and of each density without and with
    correction.

    ``quality`` is the share of questions answered rightly, or without questions the similarity to the dense texts.
    """
    quality = reference.answers.accuracy()["all"] if reference.answers else 1.0
    rows: list[dict[str, Any]] = [
        {"kind": "dense", "density": 1.0, "effective_density": 1.0, "quality": quality, "exact_match": 1.0}
        | {"similarity": 1.0, "advance_length": None, "speed_ratio": 1.0, "perplexity": None}
        | {"read_density": 1.0, "effective_density_formula": None, "effective_density_expected": None}
    ]
    if points:
        rows[0]["perplexity"] = points[0]["scored"]["dense_perplexity"]
    for point in points:
        for kind in ("sparse", "corrected"):
            if kind in point:
                made = point[kind]
                answered = made["probes"]["accuracy"]["all"] if "probes" in made else made["similarity"]
                rows.append(
                    {
                        "kind": kind,
                        "density": point["density"],
                        "read_density": point["read_density"],
                        "effective_density": made["effective_density"],
                        "effective_density_formula": made.get("effective_density_formula"),
                        "effective_density_expected": made.get("effective_density_expected"),
                        "quality": answered,
                        "exact_match": made["exact_match"],
                        "similarity": made["similarity"],
                        "advance_length": made["advance_length"],
                        "speed_ratio": made["speed_ratio"],
                        "perplexity": point["scored"]["sparse_perplexity"] if kind == "sparse" else None,
                    }
                )
    return rows
