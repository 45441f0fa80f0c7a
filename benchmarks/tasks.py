"""Accuracy of a model and its 2:4 version on tasks of lm-evaluation-harness, with items from local files.

    python benchmarks/tasks.py --dense demo --pruned OUT --task-files DIR --limit 100

OUT is a run folder, as of `compressllm prune demo OUT --method sparsegpt --pattern 2:4 --data C4 --samples 32 --seqlen
512`. Each row is one task on one model. `theirs` of a row is what lm-eval's own code says of the first --check items of
the same task: its `hf` model loads the folder, and its task is given the items in the columns of the published set in
the place of the hub's answer; every number and every item's score must be the same as ours on the same items. Rows that
the result file has already with the same limit are not measured again, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import datasets

from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.eval.scores import task_result
from compressllm.eval.taskfiles import find_task_files, read_rows
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.stages.environment import environment
from compressllm.stages.evaluate import measure

RESULT = Path(__file__).parent / "results" / "tasks.json"
TASKS = (
    "arc_easy,arc_challenge,openbookqa,boolq,piqa,winogrande,commonsense_qa,social_iqa,copa,hellaswag,lambada_openai,"
    "svamp,triviaqa"
)
OURS_ALONE = {"svamp"}  # lm-eval has no such task


def published(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row as the hub would give it; written anew here, so that it checks what the package does."""
    if task == "boolq":
        return {"question": row["question"], "passage": row["passage"], "label": 1 if row["answer"] else 0}
    if task == "triviaqa":
        return {"question": row["question"], "answer": {"aliases": row["aliases"], "value": row["answer"]}}
    if task == "hellaswag":  # its definition puts these together again
        start = row["query"].removeprefix(row["activity_label"] + ": ")
        return {
            "activity_label": row["activity_label"],
            "ctx_a": start,
            "ctx_b": "",
            "endings": row["choices"],
            "label": str(row["gold"]),
        }
    return row


def theirs(bundle: Bundle, task: str, rows: list[dict[str, Any]], options: argparse.Namespace, limit: int) -> Any:
    """lm-eval's own result, the items standing in for the hub's."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    items = datasets.Dataset.from_list([published(task, row) for row in rows])
    splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), items))
    assert bundle.checkpoint is not None
    with mock.patch.object(datasets, "load_dataset", return_value=splits):
        return simple_evaluate(
            model="hf",
            model_args={"pretrained": str(bundle.checkpoint.folder), "dtype": options.dtype},
            device="cpu",
            batch_size=options.batch_size,
            tasks=[task],
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=1000,
            task_manager=TaskManager(),
        )


def compared(bundle: Bundle, task: str, path: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Both codes on the first items; None of a task that lm-eval lacks."""
    if not options.check or task in OURS_ALONE:
        return None
    found = task_result(task, theirs(bundle, task, read_rows(path), options, options.check))
    mine = ours(bundle, task, options, options.check)
    keys = ("items_sha256", "scores", "items")
    metrics = {name: value["value"] for name, value in found["metrics"].items()}
    mine_metrics = {name: value["value"] for name, value in mine["metrics"].items()}
    return {
        "items": found["items"],
        "theirs": metrics,
        "ours": mine_metrics,
        "largest_difference": max(abs(metrics[name] - mine_metrics[name]) for name in metrics),
        "same_prompts_and_scores": all(found[key] == mine[key] for key in keys),
    }


def ours(bundle: Bundle, task: str, options: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """Our result."""
    config = EvalConfig(
        tasks=(task,),
        task_files=tuple(options.task_files),
        limit=limit,
        num_fewshot=0,
        batch_size=options.batch_size,
        dtype=options.dtype,
        backend="dense",
    )
    result: dict[str, Any] = measure(bundle, config, Run())["tasks"][task]
    return result


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="demo")
    parser.add_argument("--pruned", required=True)
    parser.add_argument("--recovered", help="the pruned model after training")
    parser.add_argument("--task-files", nargs="+", required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--check", type=int, default=8, help="items on which lm-eval's own code runs too; 0 for none")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()

    begun = time.monotonic()
    tasks = options.tasks.split(",")
    files = find_task_files(tasks, options.task_files)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    record |= {
        "what": "accuracy with standard errors, dense and at 2:4, zero-shot, on the first items of local files",
        "command": "python benchmarks/tasks.py --pruned OUT --task-files DIR --limit N, see its first lines",
        "environment": environment(),
    }
    models = {"dense": options.dense, "2:4": options.pruned}
    if options.recovered:
        models["2:4 recovered"] = options.recovered
    for task in tasks:
        for name, model in models.items():
            key = {"model": name, "task": task}
            have = [row for row in record["results"] if key.items() <= row.items()]
            if have and have[0]["limit"] == options.limit:
                continue
            if time.monotonic() - begun > options.seconds:
                return
            bundle = open_bundle(model)
            found = ours(bundle, task, options, options.limit)
            scores = found.pop("scores")
            row = key | {"limit": options.limit} | found | {
                "scores": {metric: "".join(map(str, values)) for metric, values in scores.items()},  # item by item
                "check": compared(bundle, task, files[task].items, options),
                "loadavg": os.getloadavg()[0],
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            record["results"] = [one for one in record["results"] if one not in have] + [row]
            options.out.write_text(json.dumps(record, indent=2) + "\n")
            print(name, task, row["metrics"], row["check"], flush=True)


if __name__ == "__main__":
    main()
