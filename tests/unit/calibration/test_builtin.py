import sys

import pytest

from compressllm.calibration.builtin import Builtin, split_topics
from compressllm.core.errors import CalibrationError


def shingles(texts, words):
    """Every run of so many words."""
    return {tuple(run) for text in texts for run in zip(*(text.split()[i:] for i in range(words)), strict=False)}


def test_parts_are_long_alike_and_disjoint():
    calibration, evaluation = list(Builtin().texts("calibration")), list(Builtin().texts("evaluation"))
    sizes = sum(map(len, calibration)), sum(map(len, evaluation))
    assert max(sizes) < 1.1 * min(sizes)
    assert sizes[1] / 4.2 > 40 * 1024  # at four characters a token, 40 windows and to spare
    assert len(shingles(evaluation, 25)) > 10_000
    assert not shingles(calibration, 25) & shingles(evaluation, 25)


def test_texts_are_stripped_and_the_same_every_time():
    texts = list(Builtin().texts("evaluation"))
    assert texts == list(Builtin().texts("evaluation"))
    assert all(text and text == text.strip() for text in texts)


def paragraph(letter):
    return letter * 100


def test_topics_that_share_a_paragraph_stay_together():
    a, b, c, d = map(paragraph, "abcd")
    topics = {
        "one": f"{a}\n\n{b}\n\n{c}",
        "cousin": f"{c}\n\nshort",
        "repeat": b,
        "two": f"{d}\n\n{d}\n\nand a few words",
        "tiny": "no paragraph worth the name",
    }
    parts = split_topics(topics)
    assert parts == {"evaluation": {"one"}, "calibration": {"two", "tiny"}}  # cousin's one paragraph is a repeat
    topics["cousin"] += "\n\n" + paragraph("e")
    assert split_topics(topics)["evaluation"] == {"one", "cousin"}
    topics["bridge"] = f"{a}\n\n{d}"
    assert not any("bridge" in part for part in split_topics(topics).values())


def test_split_does_not_depend_on_the_order_of_topics():
    topics = {name: paragraph(name) * (3 + i % 4) for i, name in enumerate("abcdefgh")}
    assert split_topics(topics) == split_topics(dict(reversed(topics.items())))


def test_python_without_the_topics_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CalibrationError, match=r"builtin: this Python comes without pydoc_data\.topics; install"):
        Builtin().texts("calibration")
