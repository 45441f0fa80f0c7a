"""Records to train on: what of them is learnt, what is left out, and that packed ones do not see each other."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressllm.core.errors import CalibrationError, RecipeError, UnsupportedModelError
from compressllm.recover.conversation import Encoded, encode_all
from compressllm.recover.packing import check_packing, pack_records
from compressllm.recover.records import RecordConfig
from compressllm.recover.taskdata import load_tasks

TINY = Path(__file__).parents[2] / "tiny" / "model"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Any:
    (encoded,) = encode_all([messages], tokenizer)
    return encoded


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(index: int, length: int = 10) -> dict[str, str]:
    return {"instruction": f"Say {index}.", "input": "", "output": chr(97 + index % 26) * length}


def learnt(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    assert all(label in (-100, following) for label, following in zip(labels, [*ids[1:], None], strict=True))
    return tokenizer.decode([label for label in labels if label != -100])


def test_only_the_answers_are_learnt(chatty: PreTrainedTokenizerBase) -> None:
    turns = [("system", "Be short."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    encoded = encode([{"role": role, "content": content} for role, content in turns], chatty)
    eos = chatty.eos_token
    assert chatty.decode(encoded.ids) == (
        f"<system>Be short.<user>One?<assistant>1{eos}\n<user>Two?<assistant>2{eos}\n"
    )
    assert learnt(encoded.ids, encoded.labels(), chatty) == f"1{eos}2{eos}"


def test_what_is_asked_is_tokenised_as_when_the_model_answers(chatty: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    asked = chatty.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    ids = chatty(asked, add_special_tokens=False)["input_ids"]
    encoded = encode(messages, chatty)
    assert encoded.ids[: len(ids)] == ids
    assert not any(encoded.said[: len(ids)])


def test_without_a_template_turns_are_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    encoded = encode(messages, tokenizer)
    assert tokenizer.decode(encoded.ids).endswith(f"ab\n\ncd{tokenizer.eos_token}")
    assert learnt(encoded.ids, encoded.labels(), tokenizer) == f"cd{tokenizer.eos_token}"


def test_a_template_that_will_not_have_a_record_is_a_reason(chatty: PreTrainedTokenizerBase) -> None:
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    chatty.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '' }}")
    assert encode(messages, chatty) == "whose earlier turns the chat template rewrites"
    chatty.chat_template = "{{ raise_exception('only user turns') }}"
    assert encode(messages, chatty) == "that the chat template refuses (only user turns)"


def test_every_record_is_in_exactly_one_row(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "all.jsonl", [record(i, 3 + i % 20) for i in range(40)])
    data = load_tasks([path], chatty, 256)
    seen = []
    for rows in (data.train, data.held_out):
        batch = rows.batch(range(len(rows)))
        assert batch["input_ids"].shape == (len(rows), 256)
        for ids, labels, positions in zip(*(batch[key].tolist() for key in batch), strict=True):
            starts = [at for at, position in enumerate(positions) if position == 0] + [256]
            for a, b in pairwise(starts):
                assert positions[a:b] == list(range(b - a))
                if any(label != -100 for label in labels[a:b]):
                    seen.append(learnt(ids[a:b], labels[a:b], chatty).removesuffix(chatty.eos_token))
    assert sorted(seen) == sorted(chr(97 + i % 26) * (3 + i % 20) for i in range(40))
    assert data.facts["used"] == 40
    assert data.facts["tokens_of_records"] > 0.8 * data.facts["tokens"]


def test_packed_records_do_not_see_each_other(llama: PreTrainedModel) -> None:
    records = [Encoded([3 + i, 4, 5 + i, 6 + i], [False, True, True, True]) for i in range(3)]
    batch = pack_records(records, 14, pad=0).batch([0])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        together = llama(**inputs, use_cache=False).logits[0]
        for index, one in enumerate(records):
            alone = llama(input_ids=torch.tensor([one.ids])).logits[0]
            torch.testing.assert_close(together[4 * index : 4 * index + 4], alone, rtol=1e-4, atol=1e-4)


def test_models_that_cannot_keep_packed_records_apart_are_refused(decoder: PreTrainedModel) -> None:
    if decoder.config.model_type != "opt":
        return check_packing(decoder)
    with pytest.raises(UnsupportedModelError, match="see each other; train with packing off"):
        check_packing(decoder)


def test_padded_rows_give_what_the_records_give_alone(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, llama: PreTrainedModel
) -> None:
    path = write(tmp_path / "all.jsonl", [record(i, 3 + i) for i in range(6)])
    rows = load_tasks([path], chatty, 64, RecordConfig(packing=False)).train
    batch = rows.batch([1, 3, 0])
    assert {tuple(value.shape) for value in batch.values()} == {(3, max(len(rows.records[i].ids) for i in (0, 1, 3)))}
    assert batch["attention_mask"].sum(1).tolist() == [len(rows.records[i].ids) for i in (1, 3, 0)]
    assert not (batch["labels"] != -100)[batch["attention_mask"] == 0].any()
    assert batch["labels"][1, : len(rows.records[3].ids)].tolist() == rows.records[3].labels()


def test_bad_records_are_counted_and_never_fatal(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    lines = [
        json.dumps(record(0)).encode(),
        b"{not json",
        b"\xff\xfe",
        b"[1]",
        b'{"instruction": "\\ud800", "output": "x"}',
        json.dumps({"instruction": "Say."}).encode(),
        json.dumps({"instruction": "Say.", "output": " "}).encode(),
        json.dumps({"instruction": 3, "output": "x"}).encode(),
        json.dumps({"instruction": "Say.", "input": ["x"], "output": "x"}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(),
        json.dumps({"messages": [{"role": "user"}]}).encode(),
        json.dumps({"messages": "x"}).encode(),
        json.dumps(record(1, 500)).encode(),
        b"",
        json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}).encode(),
    ]
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    data = load_tasks([path], chatty, 64)
    assert data.facts["used"] == 2
    unused = {
        reason: (one["records"], int(one["first"].rpartition(":")[2])) for reason, one in data.facts["unused"].items()
    }
    assert unused == {
        "not JSON": (1, 2),
        "not UTF-8": (2, 3),
        "not a JSON object": (1, 4),
        "without field 'output'": (1, 6),
        "with an empty field 'output'": (1, 7),
        "with a field 'instruction' that is no text": (1, 8),
        "with a field 'input' that is no text": (1, 9),
        "without an assistant's turn in 'messages'": (1, 10),
        "with a turn in 'messages' that lacks a role or content": (1, 11),
        "with a field 'messages' that is no list": (1, 12),
        "longer than 64 tokens": (1, 13),
    }
    assert "1 longer than 64 tokens (first: " in data.notes[0]


def test_long_records_are_cut_if_asked(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    long_question = {"instruction": "why? " * 100, "output": "so"}
    path = write(tmp_path / "long.jsonl", [record(0), record(1), record(2, 500), long_question])
    data = load_tasks([path], chatty, 64, RecordConfig(over_length="truncate"))
    assert data.facts["used"] == 3
    assert set(data.facts["unused"]) == {"cut to 64 tokens", "without an answer in the first 64 tokens"}
    assert data.facts["tokens_of_records"] <= 3 * 64


def test_fields_have_other_names(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    records = [{"q": f"Say {i}.", "text": "context", "a": "x"} for i in range(3)]
    config = RecordConfig(prompt="q", context="text", response="a", packing=False)
    data = load_tasks([write(tmp_path / "qa.jsonl", records)], chatty, 64, config)
    assert "Say " in (text := chatty.decode(data.train.records[0].ids))
    assert "\n\ncontext<assistant>x" in text


def test_the_same_records_are_held_out_every_time(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "all.jsonl", [record(i, 3 + i % 20) for i in range(40)])
    config = RecordConfig(packing=False)
    one, again = (load_tasks([path], chatty, 64, config, held_out=0.2) for _ in range(2))
    assert one.facts == again.facts
    shown, aside = ({tuple(record.ids) for record in rows.records} for rows in (one.train, one.held_out))
    assert not shown & aside
    assert len(shown) + len(aside) == 40
    share = sum(map(len, aside)) / sum(map(len, shown | aside))
    assert 0.2 <= share < 0.3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"paths": []}, RecipeError, "there is no file"),
        ({"seqlen": 100, "max_seqlen": 64}, RecipeError, "the 64 tokens that the model takes"),
        ({"held_out": 1.0}, RecipeError, "between 0 and 1"),
        ({"tokenizer": None}, CalibrationError, "has no tokenizer"),
        ({"vocab_size": 10}, CalibrationError, "the model has 10; take the tokenizer"),
        ({"seqlen": 4}, CalibrationError, "0 records can be used, at least 2 are needed: 4 longer than 4 tokens"),
        ({"paths": [Path("nowhere.jsonl")]}, CalibrationError, "cannot be read: No such file"),
    ],
)
def test_refuses(
    change: dict[str, Any], error: type, message: str, tmp_path: Path, chatty: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "all.jsonl", [record(i) for i in range(4)])
    arguments = {"paths": [path], "tokenizer": chatty, "seqlen": 64} | change
    with pytest.raises(error, match=message):
        load_tasks(**arguments)


def test_a_broken_archive_is_refused(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "half.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(record(0)).encode() * 50)[:40])
    with pytest.raises(CalibrationError, match="not a whole gzip file"):
        load_tasks([path], chatty, 64)
