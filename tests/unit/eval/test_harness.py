"""Tasks from local files against lm-evaluation-harness's own code, given the same items as if from the hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.api.group import Group
from lm_eval.config.group import AggMetricConfig, GroupConfig
from lm_eval.tasks import TaskManager

from compressllm.core.errors import CompressError
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.eval.harnesstasks import load_tasks, open_manager
from compressllm.eval.scores import accuracy_metric
from compressllm.models.bundle import open_bundle
from compressllm.stages.evaluate import measure

TINY = Path(__file__).parents[2] / "tiny" / "model"
LONG = {"max_position_embeddings": 1024}  # generation alone wants 256 tokens
CHOICES = {"text": ["the sea", "a bread", "rain"], "label": ["A", "B", "C"]}
FIVE = {"text": ["a", "bank", "tree", "of", "it"], "label": ["A", "B", "C", "D", "E"]}


def rows(*items: dict) -> list[dict]:
    """Three items of one form, told apart by the text that has a # in it."""
    return [
        {key: value.replace("#", word) if isinstance(value, str) else value for key, value in item.items()}
        for word in ("stone", "water", "night")
        for item in items
    ]


#: Task -> rows as local files have them.
LOCAL = {
    "arc_easy": rows({"question": "What is a #?", "choices": CHOICES, "answerKey": "B"}),
    "arc_challenge": rows({"question": "Why a #?", "choices": CHOICES, "answerKey": "C"}),
    "openbookqa": rows({"question_stem": "A # is", "choices": CHOICES, "answerKey": "A"}),
    "boolq": rows({"question": "is # dry", "passage": "The # was dry.", "answer": True}),
    "piqa": rows({"goal": "To find a #", "sol1": "look.", "sol2": "walk away from it.", "label": 1}),
    "winogrande": rows(
        {"sentence": "The # met the bird, but _ fell.", "option1": "it", "option2": "bird", "answer": "2"}
    ),
    "commonsense_qa": rows({"question": "Where is a #? ", "choices": FIVE, "answerKey": "D"}),
    "social_iqa": rows(
        {"context": "He saw a #.", "question": "Why?", "answerA": "a", "answerB": "no", "answerC": "c", "label": "3"}
    ),
    "copa": rows(
        {"premise": "The # fell.", "choice1": "It rained.", "choice2": "He sang.", "question": "cause", "label": 0}
    ),
    "hellaswag": rows(
        {"activity_label": "Cooking", "query": "Cooking: A # is. He", "choices": ["sits.", "goes  home."], "gold": 1}
    ),
    "lambada_openai": rows({"text": "he said it was the # and the #"}),
    "triviaqa": rows({"question": "What is a #", "answer": "Rock", "aliases": ["rock", "the"]})[:2],
    "mmlu": rows(
        {"question": "A #? ", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
        {"question": "No #?", "subject": "virology", "choices": ["e", "b", "c", "d"], "answer": 0},
        {"question": "Or #?", "subject": "virology", "choices": ["e", "b", "c", "d"], "answer": 1},
    ),
}
FOLDERS = [
    "arc",
    "openbookqa",
    "super_glue/boolq",
    "piqa",
    "winogrande",
    "commonsense_qa",
    "siqa",
    "super_glue/copa",
    "hellaswag",
    "lambada",
    "triviaqa",
    "mmlu/default",
]
HUB = {
    "allenai/ai2_arc": {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"},
    "allenai/openbookqa": {"main": "openbookqa"},
    "aps/super_glue": {"boolq": "boolq", "copa": "copa"},
    "baber/piqa": {None: "piqa"},
    "allenai/winogrande": {"winogrande_xl": "winogrande"},
    "tau/commonsense_qa": {None: "commonsense_qa"},
    "lighteval/siqa": {None: "social_iqa"},
    "Rowan/hellaswag": {None: "hellaswag"},
    "EleutherAI/lambada_openai": {"default": "lambada_openai"},
    "mandarjoshi/trivia_qa": {"rc.nocontext": "triviaqa"},
}


def from_hub(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
    """What the hub would answer: the same items, in the columns that are published there."""
    if path == "cais/mmlu":
        found = [row for row in LOCAL["mmlu"] if row["subject"] == name]
    else:
        task = HUB[path][name]
        found = LOCAL[task]
        if task == "boolq":
            found = [{"question": r["question"], "passage": r["passage"], "label": int(r["answer"])} for r in found]
        if task == "triviaqa":
            found = [{"question": r["question"], "answer": {"aliases": r["aliases"]}} for r in found]
        if task == "hellaswag":
            found = [
                {
                    "activity_label": "Cooking",
                    "ctx_a": r["query"].removeprefix("Cooking: ").removesuffix(" He"),
                    "ctx_b": "he",  # the task writes it large
                    "endings": [f"{choice} [step]" for choice in r["choices"]],  # and takes marks away
                    "label": str(r["gold"]),
                }
                for r in found
            ]
    items = datasets.Dataset.from_list(found)
    return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), items))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, found in LOCAL.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(TINY, folder)
    (folder / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | LONG))
    return str(folder)


@pytest.fixture(scope="module")
def ours(files, model) -> dict:
    config = EvalConfig(
        tasks=tuple(LOCAL), task_files=(str(files),), num_fewshot=0, dtype="float32", backend="dense", device="cpu"
    )
    return measure(open_bundle(model), config, Run())


@pytest.fixture(scope="module")
def theirs(model) -> dict:
    root = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[str(root / folder) for folder in FOLDERS])
    mmlu = Group.from_config(
        GroupConfig(group="mmlu", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", from_hub)
        for task in manager.load(["mmlu_anatomy", "mmlu_virology"])["tasks"].values():
            mmlu.add(task)
        return lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": model, "dtype": "float32"}, device="cpu", num_fewshot=0,
            tasks=[*(name for name in LOCAL if name != "mmlu"), mmlu], task_manager=manager, bootstrap_iters=1000,
        )  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_numbers_are_lm_evals_own(ours, theirs, name):
    mine, found = ours["tasks"][name], theirs["results"][name]
    assert mine["items"] == len(LOCAL[name])
    assert accuracy_metric(mine) in mine["metrics"]
    for metric, number in mine["metrics"].items():
        key, _, filtered = metric.partition(",")
        assert number["value"] == pytest.approx(found[f"{key},{filtered or 'none'}"], rel=1e-12), metric
        stderr = found[f"{key}_stderr,{filtered or 'none'}"]
        if key != "perplexity":  # a bootstrap
            assert number["stderr"] == pytest.approx(stderr, rel=1e-12), metric


def test_prompts_are_lm_evals_own(ours, theirs):
    """Items are known by the hashes of prompts and targets, so a prompt that differs would show here."""
    from compressllm.eval.scores import task_result

    for name in LOCAL.keys() - {"mmlu"}:
        result = task_result(name, theirs)
        assert result["items_sha256"] == ours["tasks"][name]["items_sha256"], name
        assert result["scores"] == ours["tasks"][name]["scores"], name


def test_a_group_keeps_its_tasks_and_all_scores(ours):
    mmlu = ours["tasks"]["mmlu"]
    assert {name: one["items"] for name, one in mmlu["tasks"].items()} == {"mmlu_anatomy": 3, "mmlu_virology": 6}
    assert len(mmlu["scores"]["acc"]) == 9
    assert sum(mmlu["scores"]["acc"]) / 9 == pytest.approx(mmlu["metrics"]["acc"]["value"])
    assert ours["schema"] == 1
    assert "perplexity" not in ours  # tasks alone were asked for


def few(files: Path, *tasks: str, **more) -> dict:
    config = EvalConfig(tasks=tasks, task_files=(str(files),), dtype="float32", backend="dense", device="cpu", **more)
    return measure(open_bundle(str(TINY)), config, Run())["tasks"]


def test_limit_few_shot_and_our_own_task(files, tmp_path):
    (tmp_path / "piqa.jsonl").write_text((files / "piqa.jsonl").read_text())
    (tmp_path / "piqa_dev.jsonl").write_text((files / "piqa.jsonl").read_text().replace("find", "lose"))
    (tmp_path / "svamp.jsonl").write_text(json.dumps({"question": "1 and 1?", "answer": "2"}) + "\n")
    found = few(tmp_path, "piqa", "svamp", num_fewshot=0, limit=2)
    assert (found["piqa"]["items"], found["svamp"]["items"]) == (2, 1)
    shown = few(tmp_path, "piqa", num_fewshot=2, limit=2)["piqa"]
    assert shown["num_fewshot"] == 2
    assert shown["items_sha256"] != found["piqa"]["items_sha256"]


def test_unknown_names_get_a_suggestion():
    with pytest.raises(CompressError, match="unknown task 'piqq'; did you mean 'piqa'"):
        load_tasks(SimpleNamespace(all_tasks=["arc_easy", "piqa"]), "piqq", None, None)


def test_only_what_is_asked_for_is_read():
    assert {"piqa", "mmlu_anatomy"} <= set(open_manager(["piqa", "mmlu", "svamp"]).all_tasks)
    assert "arc_easy" not in open_manager(["piqa"]).all_tasks


def test_mistakes_are_one_line(files, tmp_path):
    with pytest.raises(CompressError, match=r"2 worked examples are asked for, and there is no copa_dev\.jsonl"):
        few(files, "copa", num_fewshot=2)
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}\n')
    with pytest.raises(CompressError, match="the task piqa cannot read its rows"):
        few(tmp_path, "piqa")
