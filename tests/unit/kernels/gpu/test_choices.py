"""What was found fastest is found once, and kept."""

import json

import pytest
import torch

from compressllm.kernels.gpu.choices import SEARCH, Choices, bucket

FACTS = {"gpu": "a card", "library": 802}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path))
    monkeypatch.delenv(SEARCH, raising=False)
    return tmp_path


def never():
    raise AssertionError("searched again")


def test_searched_once_and_kept_by_facts():
    choices = Choices("kind", FACTS, always=True)
    assert choices.get("a", lambda: (3, 1, -1), (0,)) == (3, 1, -1)
    assert choices.get("b", lambda: (4,), (0,)) == (4,)
    again = Choices("kind", FACTS, always=True)
    assert again.path == choices.path
    assert [again.get(case, never, (0,)) for case in "ab"] == [(3, 1, -1), (4,)]
    other = Choices("kind", FACTS | {"library": 803}, always=True)
    assert other.path != choices.path
    assert other.get("a", lambda: (9,), (0,)) == (9,)
    assert json.loads(choices.path.read_text())["facts"] == FACTS | {"torch": torch.__version__}


def test_two_processes_keep_each_others():
    one, two = (Choices("kind", FACTS, always=True) for _ in range(2))
    one.get("other", lambda: (1,), (0,))
    two.get("mine", lambda: (2,), (0,))
    one.get("more", lambda: (3,), (0,))
    assert json.loads(one.path.read_text())["choices"] == {"other": [1], "mine": [2], "more": [3]}


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"choices": 3}', '{"choices": {"a": ["x"]}}', '{"choices": {"a": 1}}']
)
def test_a_damaged_file_is_measured_anew(damage):
    path = Choices("kind", FACTS, always=True).path
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    with pytest.warns(UserWarning, match="is damaged and is measured anew"):
        assert Choices("kind", FACTS, always=True).get("a", lambda: (5,), (0,)) == (5,)
    assert Choices("kind", FACTS, always=True).get("a", never, (0,)) == (5,)


def test_who_searches(monkeypatch):
    rarely, always = Choices("r", FACTS, always=False), Choices("a", FACTS, always=True)
    assert rarely.get("a", never, (7,)) == (7,)
    monkeypatch.setenv(SEARCH, "0")
    assert always.get("a", never, (8,)) == (8,)
    monkeypatch.setenv(SEARCH, "1")
    assert rarely.get("a", lambda: (9,), (7,)) == (9,)


def test_not_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="a: its fastest variant was not searched before a CUDA graph"):
        assert Choices("kind", FACTS, always=True).get("a", never, (0,)) == (0,)


def test_a_folder_that_cannot_be_written(cache):
    (cache / "gpu").write_text("in the way")
    choices = Choices("kind", FACTS, always=True)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert choices.get("a", lambda: (1,), (0,)) == (1,)
    assert choices.get("a", never, (0,)) == (1,)


def test_buckets():
    assert [bucket(n, 8) for n in (1, 8, 9, 33, 256, 1000, 1024, 1025, 4096)] == [
        8,
        8,
        16,
        64,
        256,
        1024,
        1024,
        2048,
        4096,
    ]
