import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from compressllm.core.errors import CalibrationError
from compressllm.select.records import Record, parse_record, read_records

GOOD = {"instruction": "Add.", "input": "1 and 2", "output": "3", "label": "math"}


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("row", "turns", "response"),
    [
        (GOOD, (("user", "Add.\n\n1 and 2"),), "3"),
        ({"prompt": "Hi", "completion": " there "}, (("user", "Hi"),), "there"),
        ({"question": "Why?", "answer": "Because."}, (("user", "Why?"),), "Because."),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello."},
                    {"role": "user", "content": "Bye"},
                    {"role": "assistant", "content": "Farewell."},
                    {"role": "user", "content": "Still there?"},
                ]
            },
            (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")),
            "Farewell.",
        ),
    ],
)
def test_reads_every_form_of_record(row: Any, turns: Any, response: str) -> None:
    record = parse_record(row)
    assert record == Record(turns, response)
    assert isinstance(record, Record)
    assert record.row == row


def test_counts_bad_records_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        lines(
            GOOD,
            b"{",
            b'{"instruction": "caf\xe9", "output": "x"}',
            b'{"instruction": "half \\ud800", "output": "x"}',
            "text",
            [1],
            {"instruction": "no response"},
            {"instruction": " ", "output": "x"},
            {"instruction": "x", "output": ""},
            {"instruction": 5, "output": "x"},
            {"instruction": "x" * 1_000_001, "output": "x"},
            {"messages": [{"role": "user", "content": "only asks"}]},
            {"messages": "no list"},
            b"",
            GOOD | {"label": "said twice"},
            {"prompt": "last", "response": "one"},
        )
    )
    records, faults = read_records(path)
    assert [(one.line, one.response) for one in records] == [(1, "3"), (16, "one")]
    assert faults.counts == {
        "not JSON": 1,
        "not UTF-8": 2,
        "not an object": 2,
        "without a prompt or a response": 3,
        "with an empty prompt or response": 2,
        "with a prompt or a response that is not a string": 1,
        "over 1,000,000 characters": 1,
        "repeated": 1,
    }
    assert faults.lines["without a prompt or a response"] == [7, 12, 13]


def test_reads_gzip_json_lists_and_parquet_alike(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [GOOD, GOOD | {"output": "4"}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_bytes(lines(*rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    found = [read_records(path)[0] for path in sorted(tmp_path.iterdir())]
    assert len(found) == 4
    assert all(records == found[0] and len(records) == 2 for records in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{}\n{}\n", "no usable record: 2 without a prompt or a response"),
        ("a.jsonl", b"", "holds no usable record"),
        ("a.json", b"[{", "is not JSON"),
        ("a.csv", b"a,b", "not a kind of record file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "not a whole gzip file"),
        ("a.parquet", b"PAR1", "not a whole parquet file"),
    ],
)
def test_a_file_without_use_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="No such file"):
        read_records(tmp_path / "none.jsonl")
