"""Windows of text: what they hold, and that nothing about them depends on chance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.recover import textdata
from compressllm.recover.rows import Order, TrainingData
from compressllm.recover.textdata import load_text

TINY = Path(__file__).parents[2] / "tiny" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def write(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """Forty documents, each of one letter and a length of its own."""
    return write(tmp_path / "letters.jsonl", [chr(65 + i % 26) * (20 + i) for i in range(40)])


def texts_of(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def rows_of(data: TrainingData) -> torch.Tensor:
    return torch.cat([data.train.ids, data.held_out.ids])


def test_windows_are_the_documents_with_eos_between(letters: str, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_text([letters], tokenizer, 16)
    stream = rows_of(data).flatten()
    ends = (stream == tokenizer.eos_token_id).nonzero().flatten().tolist()
    documents = {tuple(tokenizer(text)["input_ids"]) for text in texts_of(letters)}
    found = [tuple(stream[a + 1 : b].tolist()) for a, b in zip([-1, *ends], ends, strict=False)]
    assert len(found) == len(set(found)) >= 38  # the last one is cut off
    assert set(found) <= documents
    assert found != sorted(found, key=len)  # shuffled: the file has them by length


def test_a_position_is_labelled_with_the_token_after_it(letters: str, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_text([letters], tokenizer, 8)
    batch = data.train.batch([3, 1])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == data.train.ids[[3, 1]].tolist()
    assert batch["labels"][0].tolist() == [*data.train.ids[3].tolist()[1:], -100]


def test_the_held_out_windows_are_not_trained_on(letters: str, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_text([letters], tokenizer, 16, held_out=0.25)
    total = data.facts["sources"][0]["windows"]
    assert len(data.held_out) == round(0.25 * total) == data.facts["held_out"]
    assert len(data.train) + len(data.held_out) == total
    shown = {tuple(row) for row in data.train.ids.tolist()}
    # Only repeated letters make windows that look alike; those with an end of text in them are unmistakable.
    telling = [row for row in data.held_out.ids.tolist() if tokenizer.eos_token_id in row]
    assert telling
    assert not shown & {tuple(row) for row in telling}


def test_is_the_same_every_time_and_notices_other_text(
    letters: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    one, again = load_text([letters], tokenizer, 16), load_text([letters], tokenizer, 16)
    assert torch.equal(rows_of(one), rows_of(again))
    assert one.facts == again.facts
    documents = texts_of(letters)
    other = load_text([write(tmp_path / "other.jsonl", [*documents[:-1], documents[-1] + "!"])], tokenizer, 16)
    assert one.facts["sources"][0]["text_sha256"] != other.facts["sources"][0]["text_sha256"]
    assert load_text([letters], tokenizer, 15).train.sha256 != one.train.sha256


def test_shares_decide_how_much_comes_from_each_source(
    letters: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    digits = write(tmp_path / "digits.jsonl", ["0123456789" * 8])
    data = load_text([letters, digits], tokenizer, 16, shares=(3, 1))
    letters_first, digits_last = data.facts["sources"]
    assert letters_first["windows_a_pass"] == pytest.approx(3 * digits_last["windows_a_pass"], abs=2)
    assert digits_last["times_a_pass"] > 1 > letters_first["times_a_pass"]
    assert any("digits.jsonl: its share is" in note for note in data.notes)
    ids = set(tokenizer("0123456789")["input_ids"])
    from_digits = sum(set(row) <= ids | {tokenizer.eos_token_id} for row in data.train.ids.tolist())
    assert from_digits == digits_last["windows_a_pass"]
    plain = load_text([letters, digits], tokenizer, 16)
    assert [one["times_a_pass"] for one in plain.facts["sources"]] == [1.0, 1.0]
    assert not plain.notes


def test_tells_how_many_passes_the_tokens_take(letters: str, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_text([letters], tokenizer, 16, max_tokens=10_000)
    assert data.facts["passes"] == pytest.approx(10_000 / (len(data.train) * 16))
    assert "passes are made over them" in data.notes[0]
    assert not load_text([letters], tokenizer, 16, max_tokens=100).notes


def test_of_a_very_large_source_only_a_part_is_taken(
    letters: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textdata, "_MOST_TOKENS", 300)
    monkeypatch.setattr(textdata, "_DOCUMENTS_AT_ONCE", 3)
    data = load_text([letters], tokenizer, 16)
    (facts,) = data.facts["sources"]
    assert 300 <= facts["tokens"] < 300 + 4 * 60
    assert facts["documents_taken"] < facts["documents"] == 40
    assert "of its 40 documents are taken" in data.notes[0]
    assert load_text([letters], tokenizer, 16, max_tokens=10_000).facts["sources"][0]["documents_taken"] == 40


def test_token_ids_are_taken_as_given(tmp_path: Path) -> None:
    ids = np.arange(60, dtype=np.uint16).reshape(10, 6)
    np.save(tmp_path / "ids.npy", ids)
    source = str(tmp_path / "ids.npy")
    assert rows_of(load_text([source], None, 6)).tolist() == ids.tolist()
    with pytest.raises(CalibrationError, match="holds windows of 6 tokens, seqlen says 5"):
        load_text([source], None, 5)
    with pytest.raises(CalibrationError, match="holds token id 59"):
        load_text([source], None, 6, vocab_size=40)


def test_builtin_text_trains_on_its_calibration_part(tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_text(["builtin"], tokenizer, 64, vocab_size=len(tokenizer))
    assert len(data.train) > 500
    assert int(data.train.ids.max()) < len(tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "there is no source"),
        ({"shares": (1.0, 2.0)}, "2 shares for 1 sources"),
        ({"shares": (0.0,)}, "must be more than 0"),
        ({"held_out": 0.0}, "between 0 and 1"),
        ({"seqlen": 4096, "max_seqlen": 64}, "the 64 tokens that the model takes"),
    ],
)
def test_refuses_settings_that_make_no_sense(
    change: dict[str, object], message: str, letters: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    arguments = {"sources": [letters], "tokenizer": tokenizer, "seqlen": 16} | change
    with pytest.raises(RecipeError, match=message):
        load_text(**arguments)


def test_refuses_text_that_is_too_short(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    short = write(tmp_path / "short.jsonl", ["ab"])
    with pytest.raises(CalibrationError, match="one window needs 64"):
        load_text([short], tokenizer, 64)
    single = write(tmp_path / "single.jsonl", ["abcdefghij"])
    tokens = len(tokenizer("abcdefghij")["input_ids"])
    with pytest.raises(CalibrationError, match="one to train on and one to hold out"):
        load_text([single], tokenizer, tokens)
    with pytest.raises(CalibrationError, match="no tokenizer"):
        load_text([short], None, 2)


def test_order_takes_every_row_once_a_pass_and_depends_on_nothing_else() -> None:
    order = Order(10, seed=3)
    passes = [order.indices(start, 10) for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert [Order(10, 3)[sample] for sample in (25, 7, 14)] == [passes[2][5], passes[0][7], passes[1][4]]
    assert Order(10, 4).indices(0, 10) != passes[0]
    shared = [order.indices(5, 8, rank, 3) for rank in range(3)]
    assert [shared[i % 3][i // 3] for i in range(8)] == order.indices(5, 8)
    with pytest.raises(RecipeError, match="no row"):
        Order(0, 0)
