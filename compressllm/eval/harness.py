"""Accuracy on tasks by EleutherAI's lm-evaluation-harness, an extra."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressllm.core.errors import BackendUnavailableError, FormatError
from compressllm.eval.config import EvalConfig
from compressllm.eval.harnesstasks import load_tasks, open_manager
from compressllm.eval.scores import pooled, task_result
from compressllm.eval.taskfiles import find_task_files

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_BOOTSTRAP: Final = 1000  # resamples for the few metrics without a closed form, such as lambada's perplexity


def check_tasks(config: EvalConfig) -> None:
    """Find out before any work that tasks cannot be measured.

    Raises: BackendUnavailableError without the extra; RecipeError if a task's file is not there.
    """
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        raise BackendUnavailableError(
            f"tasks {', '.join(config.tasks)}: need lm-evaluation-harness; run: pip install 'compressllm[lm-eval]'"
        )
    find_task_files(config.tasks, config.task_files)


@dataclass(frozen=True)
class OpenTasks:
    """Tasks whose items and definitions are at hand.

    Args:
        config: What was asked for.
        groups: Name as it was asked for -> the tasks it stands for.
        sources: The same name -> the file or the hub's data set that its items are of.
    """

    config: EvalConfig
    groups: Mapping[str, list[Task]]
    sources: Mapping[str, str]

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, dict[str, Any]]:
        """Each task's result, by the name it was asked for, in the form `task_result` gives; a group's is `pooled`.

        Prompts, choices, filters, metrics and the model's handling are lm-eval's; with files, only the items are not.

        Args:
            model: In memory, on its device; sparse linears may be on any backend.

        Raises: FormatError without a tokenizer.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        if tokenizer is None:
            raise FormatError("the model folder holds no tokenizer, so tasks cannot be put to it")
        config = self.config
        tokenizer = copy.deepcopy(tokenizer)  # it is given a pad token
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
            tasks=[task for group in self.groups.values() for task in group],
            num_fewshot=config.num_fewshot,
            limit=int(config.limit) if config.limit and config.limit >= 1 else config.limit,
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=config.apply_chat_template,
            task_manager=TaskManager(include_defaults=False),  # nothing is looked up any more
        )
        results = {}
        for name, group in self.groups.items():
            parts = {task.task_name: task_result(task.task_name, found) for task in group}
            results[name] = parts[name] if name in parts else pooled(parts)
            results[name]["source"] = self.sources[name]
        return results


def open_tasks(config: EvalConfig) -> OpenTasks:
    """Find the tasks and read their items, before a model is loaded.

    Raises: FormatError for rows that a task cannot read; RecipeError for an unknown task; CalibrationError if items
        cannot be fetched.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of settings that are meant so
    files = find_task_files(config.tasks, config.task_files)
    manager = open_manager(config.tasks)
    groups = {name: load_tasks(manager, name, files.get(name), config.num_fewshot) for name in config.tasks}
    sources = {
        name: files[name].items.name if name in files else str(group[0].config.dataset_path)
        for name, group in groups.items()
    }
    return OpenTasks(config, groups, sources)
