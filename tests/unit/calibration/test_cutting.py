from random import Random

import pytest
import torch

from compressllm.calibration.cutting import (
    calibration_windows,
    draw_documents,
    pack,
    packed_windows,
    stream_windows,
    tokenize,
)
from compressllm.core.errors import CalibrationError

BOS, EOS = 1, 2


class Words:
    """A tokenizer of numbers: "10 11" -> [BOS, 10, 11]."""

    def __init__(self, eos=EOS, bos=True):
        self.eos_token_id, self.bos, self.calls = eos, bos, 0

    def __call__(self, text, verbose=True):
        assert not verbose
        self.calls += 1
        return {"input_ids": [BOS] * self.bos + [int(word) for word in text.split()]}


def document(number, length):
    """A text whose tokens name it and their place: 1000, 1001, … for document 1."""
    return " ".join(str(1000 * number + place) for place in range(length))


def test_stream_is_joined_tokenised_once_and_cut_end_to_end():
    tokenizer = Words()
    windows = stream_windows([document(1, 5), "", document(2, 4)], tokenizer, 4, "here")
    assert windows.tolist() == [[BOS, 1000, 1001, 1002], [1003, 1004, 2000, 2001]]  # 2002 and 2003 are dropped
    assert windows.dtype == torch.int64
    assert tokenizer.calls == 1


def test_stream_joins_by_two_newlines():
    seen = []

    def tokenizer(text, verbose):
        seen.append(text)
        return {"input_ids": [0] * 10}

    stream_windows(["a\n", "", "b"], tokenizer, 5, "here")
    assert seen == ["a\n\n\n\n\nb"]


def test_too_short_a_stream():
    with pytest.raises(CalibrationError, match="here: comes to 3 tokens, one window needs 4; give more text or"):
        stream_windows([document(1, 2)], Words(), 4, "here")


def test_crops_are_one_a_document_and_contiguous():
    texts = [document(number, 8 if number % 2 else 30) for number in range(1, 41)]
    windows, how, note = calibration_windows(texts, Words(), 12, 10, 0, "here")
    assert (how, note) == ("crops", None)
    assert windows.shape == (12, 10)
    assert windows.dtype == torch.int64
    assert (windows[:, 2:].diff() == 1).all()  # in a row; BOS may come first
    owners = (windows[:, -1] // 1000).tolist()
    assert len(set(owners)) == 12
    assert all(owner % 2 == 0 for owner in owners)


def test_a_document_needs_more_tokens_than_a_window_has():
    texts = [document(number, 9) for number in range(1, 30)]  # 10 with BOS
    assert calibration_windows(texts, Words(), 4, 10, 0, "here")[1] == "packed"
    windows, how, _ = calibration_windows(texts, Words(), 4, 9, 0, "here")
    assert how == "crops"
    assert (windows[:, 0] == BOS).all()  # as in the reference, the last offset is never drawn


def test_documents_are_tokenised_only_as_they_are_tried():
    tokenizer = Words()
    calibration_windows([document(number, 30) for number in range(1, 1000)], tokenizer, 5, 10, 0, "here")
    assert tokenizer.calls == 5


def test_crops_follow_the_seed_and_nothing_else():
    texts = [document(number, 30) for number in range(1, 41)]

    def draw(seed):
        return calibration_windows(texts, Words(), 8, 10, seed, "here")[0]

    first = draw(0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_long_documents_are_packed():
    texts = [document(number, 4) for number in range(1, 10)] + [" \n"] + [document(10, 30)]
    windows, how, note = calibration_windows(texts, Words(), 5, 10, 0, "here")
    stream = []
    for number in range(1, 11):
        stream += [EOS, *Words()(document(number, 30 if number == 10 else 4), verbose=False)["input_ids"]]
    whole = [tuple(stream[1:][start : start + 10]) for start in range(0, len(stream) - 10, 10)]
    assert how == "packed"
    assert note == "here: 1 of 10 documents are longer than 10 tokens, 5 are needed; took windows of all of them packed"
    assert {tuple(window) for window in windows.tolist()} <= set(whole)
    assert len({tuple(window) for window in windows.tolist()}) == 5


def test_too_few_tokens_for_windows_apart_are_cut_overlapping():
    windows, how, note = calibration_windows([document(1, 24)], Words(bos=False), 6, 10, 0, "here")
    assert (how, windows.shape) == ("packed", (6, 10))
    assert (windows.diff() == 1).all()
    assert note.endswith("packed, overlapping, as 24 tokens are fewer than 6 x 10")


def test_too_little_text_for_one_window():
    with pytest.raises(CalibrationError, match="here: comes to 6 tokens, one window needs 10; give more text or"):
        calibration_windows([document(1, 2), document(2, 1)], Words(), 4, 10, 0, "here")
    with pytest.raises(CalibrationError, match="here: comes to 0 tokens"):
        calibration_windows([], Words(), 4, 10, 0, "here")


def test_packing_puts_eos_between_and_only_there():
    parts = [torch.tensor(ids, dtype=torch.int32) for ids in ([5, 6], [7, EOS], [8], [9])]
    assert pack(parts, EOS).tolist() == [5, 6, EOS, 7, EOS, 8, EOS, 9]
    assert pack(parts, None).tolist() == [5, 6, 7, EOS, 8, 9]
    assert pack([], EOS).tolist() == []


def test_packed_windows_cover_the_stream_when_all_are_wanted():
    stream = torch.arange(35, dtype=torch.int32)
    windows = packed_windows(stream, 3, 10, Random(0))
    assert sorted(windows[:, 0].tolist()) == [0, 10, 20]
    assert packed_windows(stream[:10], 4, 10, Random(0)).tolist() == [list(range(10))] * 4


def test_draw_keeps_all_in_order_or_an_even_share():
    assert draw_documents(map(str, range(9)), 9, Random(0)) == [str(i) for i in range(9)]
    counts = dict.fromkeys(map(str, range(10)), 0)
    for seed in range(2000):
        drawn = draw_documents(map(str, range(10)), 3, Random(seed))
        assert len(set(drawn)) == 3
        for text in drawn:
            counts[text] += 1
    assert all(abs(count - 600) < 100 for count in counts.values())  # five standard deviations


def test_the_search_for_long_documents_ends():
    tokenizer = Words()
    texts = ("5 6" for _ in range(50_000))
    _, how, note = calibration_windows(texts, tokenizer, 4, 10, 0, "here")
    assert (how, tokenizer.calls) == ("packed", 10_000)
    assert "0 of 10000 documents" in note


def test_tokenize_takes_an_empty_text():
    assert tokenize(Words(bos=False), "").tolist() == []
