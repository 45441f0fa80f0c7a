"""The model card of an export: facts of its files, and of the run it came from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from compressllm.core.atomic import write_atomically
from compressllm.core.stockcodes import FORMAT
from compressllm.models.facts import Facts

CARD: Final = "README.md"

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(folder: Path, facts: Facts, ratio: float, run: Mapping[str, Any] | None) -> None:
    """Write ``README.md`` with the metadata the Hugging Face hub reads.

    Only what is known is said: a licence if the source's card has one, a base model if the run names a hub id or that
    card names one.

    Args:
        facts: Of the folder.
        ratio: Bytes of the sparse linears over their bytes with all zeros in place.
        run: Manifest of the run that made it, as far as it has got.
    """
    origin = str(run["model"]) if run else ""
    patterns = Counter(str(pattern) for pattern in facts.patterns.values() if pattern.sparsity)
    schemes = Counter(facts.schemes.values())
    common = patterns.most_common(1)[0][0] if patterns else ""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _HUB_ID.fullmatch(origin.partition("@")[0]) and not Path(origin).exists():
        head["base_model"] = origin.partition("@")[0]
    elif base := facts.source.get("base_model"):
        head["base_model"] = base
    head |= {key: facts.source[key] for key in ("license", "license_name", "license_link") if key in facts.source}
    kinds = [*(["pruned", "sparse", *sorted(patterns)[:4]] if patterns else []), *sorted(schemes)]
    head["tags"] = ["compressllm", *kinds]
    name = head.get("base_model") or Path(origin).name or "A model"  # not where it lay on somebody's disk
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {name}{f', pruned to {common}' if len(patterns) == 1 else ', pruned' if patterns else ''}"
        + "".join(f", {scheme}" for scheme in sorted(schemes)),
        "",
        *_files(facts, ratio, patterns),
        *_made(run),
        *_answers(run),
        *_loading(facts),
        "## Hashes",
        "",
        "| file | SHA-256 |",
        "| --- | --- |",
        *(f"| {file} | `{digest}` |" for file, digest in facts.sha256.items()),
        *([f"| all masks, see compressllm.json | `{facts.masks_sha256}` |"] if facts.masks_sha256 else []),
    ]
    write_atomically(folder / CARD, "\n".join(lines) + "\n")  # written anew when a run is over


def run_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run that left a model folder, up to the stage after it; None if none did."""
    for root in (folder.parent, folder.parent.parent):  # of the run's own model, of one of its stages
        try:
            manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text())
            models = [stage["model"] for stage in manifest["stages"]]
        except (OSError, ValueError, KeyError, TypeError):  # none there, or of something else
            continue
        left = [at for at, model in enumerate(models) if model and (root / model).resolve() == folder.resolve()]
        if left:
            later = (at for at in range(left[-1] + 1, len(models)) if models[at])
            return manifest | {"stages": manifest["stages"][: next(later, len(models))]}
    return None


def _files(facts: Facts, ratio: float, patterns: Mapping[str, int]) -> Iterator[str]:
    yield f"- Written by compressllm {facts.written_by}, format `{facts.format}`"
    if facts.schemes:
        counts = Counter(facts.schemes.values())
        yield f"- Weights rounded to {', '.join(f'{scheme} ({count} linears)' for scheme, count in counts.items())}"
    if patterns:
        sizes = {name: one.shape[0] * one.shape[1] for name, one in facts.linears.items() if one.pattern.sparsity}
        removed = sum(facts.linears[name].pattern.sparsity * size for name, size in sizes.items())
        listed = ", ".join(f"{pattern} ({count})" for pattern, count in list(patterns.items())[:4])
        more = f" and {len(patterns) - 4} more" if len(patterns) > 4 else ""
        yield f"- Sparse linears: {len(sizes)}; patterns: {listed}{more}"
        yield f"- Weights removed from them: {removed / sum(sizes.values()):.2%}"
    else:
        yield "- No linear is sparse"
    if facts.linears:
        yield f"- Size of these linears on disk: {ratio:.4f} of the dense one"
    yield ""


def _made(run: Mapping[str, Any] | None) -> Iterator[str]:
    """One row a stage: perplexities are of the model as it was then."""
    if not run or not run["stages"]:
        return
    yield from ("## How it was made", "", "| stage | settings | perplexity |", "| --- | --- | --- |")
    for stage in run["stages"]:
        measured = stage["metrics"].get("perplexity")
        yield f"| {stage['stage']} | {_settings(stage)} | {'' if measured is None else f'{measured:.4f}'} |"
    yield ""
    for protocol in dict.fromkeys(s["metrics"]["protocol"] for s in run["stages"] if "protocol" in s["metrics"]):
        yield from (f"Perplexity: {protocol}.", "")
    yield from (f"Seed {run.get('seed', 0)}.", "")


def _answers(run: Mapping[str, Any] | None) -> Iterator[str]:
    """One row a task and metric; of this model only, not of what it was made from."""
    stages = run["stages"] if run else []
    made = max((at for at, stage in enumerate(stages) if stage.get("model")), default=0)
    asked = [stage["metrics"]["tasks"] for stage in stages[made:] if "tasks" in stage["metrics"]]
    if not asked:
        return
    yield from ("## Accuracy", "", "| task | metric | items | worked examples | in percent |", "| --- |" + " --- |" * 4)
    for task, result in {name: result for tasks in asked for name, result in tasks.items()}.items():
        for metric, one in result["metrics"].items():
            error = "" if one["stderr"] is None else f" ± {100 * one['stderr']:.2f}"
            count = f"{result['items']} | {result['num_fewshot']}"
            yield f"| {task} | {metric} | {count} | {100 * one['value']:.2f}{error} |"
    yield ""


def _settings(stage: Mapping[str, Any]) -> str:
    wanted = ("method", "pattern", "masking", "losses", "max_tokens", "scheme", "format")
    config = stage["config"]
    found = [f"{key} {_word(config[key])}" for key in wanted if config.get(key) is not None]
    return ", ".join(found).replace("|", "\\|")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _loading(facts: Facts) -> Iterator[str]:
    yield from ("## Load", "", "```python")
    if facts.format == FORMAT:
        yield f"# needs the package {FORMAT}"
    if facts.variant:
        yield "import compressllm  # teaches transformers the format"
    yield from ("from transformers import AutoModelForCausalLM, AutoTokenizer", "")
    variant = f', variant="{facts.variant}"' if facts.variant else ""
    yield f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{variant})'
    yield from ('tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```", "")
