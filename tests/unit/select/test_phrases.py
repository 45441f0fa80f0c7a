import pytest

from compressllm.select.phrases import candidates, key_phrases, typical_phrases


def test_candidates_lie_between_stop_words_and_punctuation() -> None:
    text = "Write a Python function that sorts the linked list; explain John's bubble sort, then a binary search tree"
    assert candidates(text) == [
        "python function",
        "sorts",
        "linked",
        "john bubble sort",
        "binary search tree",
    ]
    assert candidates("of the very and") == []


def test_a_run_of_more_than_three_words_is_no_phrase() -> None:
    assert candidates("green apples fall slowly. red pears") == ["red pears"]


def test_key_phrases_by_degree_over_frequency() -> None:
    found = [
        ["red apple", "tree"],
        ["red apple", "pear"],
        ["tree", "pear"],
        ["rare"],
        ["common"],
        ["common"],
        ["common"],
    ]
    # red: degree 4 / frequency 2 = 2, apple likewise: 4; tree and pear: 1 each.
    assert key_phrases(found, generic=0.3) == [
        ["red apple", "tree"],
        ["red apple", "pear"],
        ["pear", "tree"],
        [],
        [],
        [],
        [],
    ]
    assert key_phrases(found, most=1, generic=0.3)[0] == ["red apple"]
    assert key_phrases(found, generic=0.5)[4] == ["common"], "three of seven are not too many for a half"


def test_typical_phrases_tell_clusters_apart() -> None:
    found = [["dog", "say"], ["dog", "say"], ["cat", "say"], ["cat", "say"], ["cat"]]
    assert typical_phrases(found, [0, 0, 1, 1, 1]) == [["dog", "say"], ["cat", "say"]]


@pytest.mark.parametrize("text", ["", "!!!", "123 456", "日本語 テキスト"])
def test_any_text_will_do(text: str) -> None:
    assert isinstance(candidates(text), list)
