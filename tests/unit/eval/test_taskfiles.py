"""Items of tasks from local files."""

import gzip
import json

import pytest

from compressllm.core.errors import CompressError
from compressllm.eval.taskfiles import TaskFile, as_published, find_task_files, read_rows


def write(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)


def test_finds_files_by_name_and_their_examples(tmp_path):
    for name in ("arc_easy.jsonl", "social_i_qa.jsonl.gz", "mmlu.jsonl", "mmlu_dev.jsonl.gz"):
        write(tmp_path / name, {})
    write(tmp_path / "other.jsonl", {})
    found = find_task_files(["arc_easy", "social_iqa", "mmlu"], [str(tmp_path)])
    assert found == {
        "arc_easy": TaskFile(tmp_path / "arc_easy.jsonl", None),
        "social_iqa": TaskFile(tmp_path / "social_i_qa.jsonl.gz", None),
        "mmlu": TaskFile(tmp_path / "mmlu.jsonl", tmp_path / "mmlu_dev.jsonl.gz"),
    }
    named = find_task_files(["arc_easy"], [str(tmp_path), f"arc_easy={tmp_path / 'other.jsonl'}"])
    assert named["arc_easy"].items.name == "other.jsonl"
    assert find_task_files(["arc_easy"], []) == {}


@pytest.mark.parametrize(
    ("where", "message"),
    [("{}", "piqa: none of .* holds piqa.jsonl"), ("piqa={}/no.jsonl", "there is no file"), ("{}/no", "is no folder")],
)
def test_files_that_are_not_there(tmp_path, where, message):
    with pytest.raises(CompressError, match=message):
        find_task_files(["piqa"], [where.format(tmp_path)])


def test_reads_rows_and_says_which_line_is_wrong(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    write(path, {"a": 1}, {"a": "é"})
    assert read_rows(path) == [{"a": 1}, {"a": "é"}]
    path = tmp_path / "x.jsonl"
    for text, message in [
        ('{}\n{"a', "x.jsonl:2: is not JSON"),
        ("[1]\n", "x.jsonl:1: is a JSON list"),
        ("\n", "no item"),
    ]:
        path.write_text(text)
        with pytest.raises(CompressError, match=message):
            read_rows(path)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-9])
    with pytest.raises(CompressError, match="not a whole gzip"):
        read_rows(tmp_path / "y.jsonl.gz")


def test_published_columns_are_kept_and_others_made():
    assert as_published("boolq", [{"answer": True}, {"answer": False, "label": 1}]) == [
        {"answer": True, "label": 1},
        {"answer": False, "label": 1},
    ]
    assert as_published("triviaqa", [{"answer": "x", "aliases": ["x", "y"]}])[0]["answer"]["aliases"] == ["x", "y"]
    published = {"answer": {"aliases": ["x"]}}
    assert as_published("triviaqa", [published]) == [published]
    assert as_published("hellaswag", [{"gold": 2}]) == [{"gold": 2, "label": "2"}]
    assert as_published("arc_easy", [{"question": "q"}]) == [{"question": "q"}]
