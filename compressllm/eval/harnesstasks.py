"""lm-evaluation-harness's tasks by name, with their items from the hub or from local files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compressllm.core.errors import CalibrationError, FormatError, RecipeError
from compressllm.core.registry import did_you_mean
from compressllm.eval.taskfiles import Row, TaskFile, as_published, read_rows
from compressllm.models.checkpoint import first_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

#: Where lm-eval defines a task, within its folder of tasks. It has over ten thousand definitions, and reading all takes
#: seconds; a task that is not found here is looked for in all of them.
_FOLDERS: Final = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "boolq": "super_glue/boolq",
    "commonsense_qa": "commonsense_qa",
    "copa": "super_glue/copa",
    "gsm8k": "gsm8k",
    "hellaswag": "hellaswag",
    "lambada_openai": "lambada",
    "mmlu": "mmlu/default",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "social_iqa": "siqa",
    "triviaqa": "triviaqa",
    "winogrande": "winogrande",
}

#: Not one of lm-eval's tasks: worded as its GSM8K, without worked examples.
_SVAMP: Final[dict[str, Any]] = {
    "task": "svamp",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n", "Question:"], "do_sample": False, "max_gen_toks": 48},
    "filter_list": [
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "regex", "regex_pattern": "(-?[0-9][0-9,]*)", "group_select": -1},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [","]}
    ],
    "metadata": {"version": 1.0},
}


def open_manager(names: Iterable[str]) -> TaskManager:
    """What knows the tasks of these names, if lm-eval does."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    wanted = set(names) - {_SVAMP["task"]}
    if wanted <= _FOLDERS.keys():
        root = Path(lm_eval.__file__).parent / "tasks"
        folders = [root / _FOLDERS[name] for name in sorted(wanted)]
        if all(folder.is_dir() for folder in folders):
            manager = TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders])
            if wanted <= set(manager.all_tasks):
                return manager
    return TaskManager()


def load_tasks(manager: TaskManager, name: str, file: TaskFile | None, shots: int | None) -> list[Task]:
    """The tasks that a name stands for: one, or those of a group.

    A task from a file is lm-eval's own definition with other items: everything that makes a prompt or a score is
    left as it is. Only a few sets come in another form than the published one, see `as_published`.

    Args:
        shots: Worked examples before each item; None leaves the task's own number.

    Raises: RecipeError for an unknown name, or worked examples that no file holds; CalibrationError if the items cannot
        be fetched; FormatError if they do not suit the task.
    """
    if name not in manager.all_tasks and name != _SVAMP["task"]:
        raise RecipeError(f"unknown task {name!r}{did_you_mean(name, manager.all_tasks)} lm-eval ls tasks shows all")
    if file is None:
        try:
            return list(manager.load([name])["tasks"].values())
        except Exception as error:  # of the hub client, its HTTP library and datasets alike
            raise CalibrationError(
                f"{name}: its items cannot be fetched from the hub: {first_line(error)}; give them with --task-files"
            ) from None
    try:
        tasks = list(manager.load([_spec(name, file)])["tasks"].values())
    except (FormatError, RecipeError):
        raise
    except Exception as error:  # of lm-eval, jinja and the task's own functions alike
        raise FormatError(
            f"{file.items}: the task {name} cannot read its rows ({type(error).__name__}: {first_line(error)}); "
            "they need the columns of the published set"
        ) from None
    wanted = tasks[0].config.num_fewshot if shots is None else shots
    if wanted and file.examples is None:
        raise RecipeError(
            f"{name}: {wanted} worked examples are asked for, and there is no {name}_dev.jsonl or {name}_train.jsonl "
            f"beside {file.items}; put one there, or give --num_fewshot 0"
        )
    return tasks


def _spec(name: str, file: TaskFile) -> dict[str, Any]:
    """lm-eval's definition of a task with other items; of MMLU, whose subjects are tasks of their own, that of each."""
    items = as_published(name, read_rows(file.items))
    examples = as_published(name, read_rows(file.examples)) if file.examples else []
    if name == _SVAMP["task"]:
        return _SVAMP | _items(items, examples)
    # A definition is only looked up, and then overridden, for the members of a group.
    if name != "mmlu":
        prepared = {"process_docs": None} if name == "hellaswag" and "query" in items[0] else {}
        return {"group": f"{name}-from-a-file", "task": [{"task": name, **_items(items, examples), **prepared}]}
    subjects, shown = _by_subject(items), _by_subject(examples)
    members = [
        {"task": f"mmlu_{subject}", **_items(rows, shown.get(subject, []))}
        for subject, rows in sorted(subjects.items())
    ]
    return {"group": "mmlu-from-a-file", "task": members}


def _items(items: Sequence[Row], examples: Sequence[Row]) -> dict[str, Any]:
    def dataset(**_: Any) -> Any:  # lm-eval passes the task's metadata
        from datasets import Dataset, DatasetDict

        splits = {"items": items, "examples": examples}
        return DatasetDict({split: Dataset.from_list(list(rows)) for split, rows in splits.items() if rows})

    return {
        "custom_dataset": dataset,
        "dataset_kwargs": {},
        "training_split": None,
        "validation_split": None,
        "test_split": "items",
        "fewshot_split": "examples" if examples else None,
    }


def _by_subject(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[str(row.get("subject"))].append(row)
    return found
