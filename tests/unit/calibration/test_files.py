import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from compressllm.calibration.files import SUFFIXES, TextFile
from compressllm.core.errors import CalibrationError, RecipeError

TEXTS = ["One é\r\n two \n", "", " three\n\n", "четыре"]


def lines(texts, field="text"):
    return "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def table(values, field="text"):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({field: values, "id": list(range(len(values)))}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


CONTENT = {  # suffix -> bytes, documents
    ".txt": ("".join(TEXTS).encode(), ["".join(TEXTS)]),
    ".raw": ("".join(TEXTS).encode(), ["".join(TEXTS)]),
    ".md": ("\ufeffmarked".encode(), ["marked"]),
    ".jsonl": (lines(TEXTS) + b"\n", TEXTS),
    ".json": (lines(TEXTS).rstrip(), TEXTS),
    ".parquet": (table(TEXTS), TEXTS),
}


@pytest.fixture
def write(tmp_path):
    def write_file(name, data):
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_file


def test_every_suffix_is_covered():
    assert set(CONTENT) == set(SUFFIXES)


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_texts_come_back_to_the_byte_for_either_split(write, suffix, gz):
    data, documents = CONTENT[suffix]
    source = TextFile(write(f"some.file{suffix}{gz}", data))
    assert list(source.texts("calibration")) == list(source.texts("evaluation")) == documents


def test_suffixes_are_read_in_any_case(write):
    assert list(TextFile(write("A.TXT", b"text")).texts("evaluation")) == ["text"]


@pytest.mark.parametrize(("suffix", "data"), [(".jsonl", lines(TEXTS, "body")), (".parquet", table(TEXTS, "body"))])
def test_another_field_can_be_named(write, suffix, data):
    path = write(f"a{suffix}", data)
    assert list(TextFile(path, field="body").texts("evaluation")) == TEXTS
    with pytest.raises(CalibrationError, match=r"has no field 'text', only body, id; name another as \{file: "):
        list(TextFile(path).texts("evaluation"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt.gz", b" \n", "a.txt.gz: holds no text"),
        ("a.jsonl", b"\n\n", "a.jsonl: holds no text"),
        ("a.jsonl", lines(["", " "]), "a.jsonl: holds no text"),
        ("a.parquet", table([""]), "a.parquet: holds no text"),
        ("a.txt", b"one\ntwo \xff", "a.txt:2: is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: is not UTF-8"),
        ("a.jsonl.gz", b'{"text": "a"}\n{"text": ', "a.jsonl.gz:2: is not JSON (Expecting value"),
        ("a.json", b"[" * 100_000, "a.json:1: is not JSON"),
        ("a.json", b'[{"text": "a"}]', "a.json:1: is a JSON list; give one object a line"),
        ("a.jsonl", b"{}", "a.jsonl:1: has no field 'text', only none"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": null}', "a.jsonl:3: field 'text' is of type NoneType, not a string"),
        ("a.parquet", table(["a", "b", None]), "a.parquet: row 3: field 'text' is of type NoneType"),
        ("a.parquet", table([1, 2]), "a.parquet: row 1: field 'text' is of type int"),
        ("a.parquet", b"PAR1 but no more", "a.parquet: is not a whole parquet file"),
        ("a.parquet.gz", table(TEXTS)[:-20], "a.parquet.gz: is not a whole parquet file"),
    ],
)
def test_bad_content_is_one_line_with_file_and_place(write, name, data, message):
    with pytest.raises(CalibrationError) as caught:
        list(TextFile(write(name, data)).texts("calibration"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"not gzip", gzip.compress(b"text" * 999)[:-9], gzip.compress(b"text" * 99)[:15]],
    ids=["no gzip", "no end", "a beginning"],  # gzip writes the time into what it makes
)
def test_damaged_gzip(tmp_path, data):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match="is not a whole gzip file; fetch it again"):
        list(TextFile(path).texts("calibration"))


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name, reason in {"a.txt": "No such file", "a.parquet.gz": "No such file", "folder.txt": "directory"}.items():
        with pytest.raises(CalibrationError, match=rf"{name}: cannot be read: .*{reason}"):
            list(TextFile(tmp_path / name).texts("calibration"))


def test_unknown_kind_of_file(tmp_path):
    with pytest.raises(RecipeError, match=r"a\.csv: not a kind of text file; known: \.txt, .*\.parquet"):
        TextFile(tmp_path / "a.csv")
