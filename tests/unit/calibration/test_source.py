import numpy as np
import pytest

from compressllm.calibration.builtin import Builtin
from compressllm.calibration.files import TextFile
from compressllm.calibration.hub import C4, WikiText2
from compressllm.calibration.source import describe_source, open_source
from compressllm.calibration.tokenids import TokenIds
from compressllm.core.errors import CalibrationError, RecipeError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("text")
    return path


def test_names_and_paths_open_the_source_they_name(text, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((1, 2), np.int64))
    assert open_source("builtin") == Builtin()
    assert open_source({"wikitext2": None}) == WikiText2()
    assert open_source("c4") == C4()
    assert open_source(str(text)) == TextFile(text)
    assert open_source({"file": {"path": str(text), "field": "body"}}) == TextFile(text, field="body")
    assert open_source(str(tmp_path / "ids.npy")) == TokenIds(tmp_path / "ids.npy")
    assert open_source({"tokens": {"path": str(tmp_path / "ids.npy")}}) == TokenIds(tmp_path / "ids.npy")


def test_home_is_expanded(text, monkeypatch):
    monkeypatch.setenv("HOME", str(text.parent))
    assert list(open_source("~/notes.md").texts("evaluation")) == ["text"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitxt2", r"unknown text source 'wikitxt2'; did you mean 'wikitext2'\? Known: builtin, .* or a path to"),
        ({"biultin": {}}, "did you mean 'builtin'"),
        ({"file": {}}, "text source file: option path is needed"),
        ({"file": {"path": "a.txt", "feild": "x"}}, "unknown option 'feild'; did you mean 'field'"),
        ({"builtin": {}, "c4": {}}, "give its name"),
        ({"file": {"path": "table.csv"}}, r"table\.csv: not a kind of text file"),
    ],
)
def test_what_is_no_source_is_a_recipe_error(spec, message):
    with pytest.raises(RecipeError, match=message):
        open_source(spec)


def test_existing_file_of_no_known_kind(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b")
    with pytest.raises(RecipeError, match="not a kind of text file"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl.gz", "gone.npy"])
def test_missing_file_is_found_out_at_once(tmp_path, name):
    for spec in (str(tmp_path / name), {"tokens" if name.endswith("npy") else "file": {"path": str(tmp_path / name)}}):
        with pytest.raises(CalibrationError, match=f"{name}: does not exist"):
            open_source(spec)


def test_folder_is_no_file(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CalibrationError, match=r"folder\.txt: is not a file"):
        open_source(str(tmp_path / "folder.txt"))


def test_sources_are_described_in_one_line():
    assert describe_source("c4") == "c4"
    assert describe_source({"c4": None}) == "c4"
    assert describe_source({"file": {"path": "a.jsonl", "field": "body"}}) == "file(path=a.jsonl, field=body)"
