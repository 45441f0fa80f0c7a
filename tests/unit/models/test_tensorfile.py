import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.models.tensorfile import DTYPES, TensorFile, TensorFileWriter, TensorSpec


def every_dtype() -> dict[str, Tensor]:
    """A tensor of every dtype with any bits at all, and one of every awkward shape."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if dtype == torch.bool:
            tensors[name] = torch.tensor([[True, False, True]])
        else:
            bits = torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
            tensors[name] = bits.view(dtype)
    scalar, empty = torch.tensor(3.5, dtype=torch.bfloat16), torch.empty(0, 7, dtype=torch.float16)
    return tensors | {"scalar": scalar, "empty": empty, "": torch.ones(1), "naïve/☃": torch.zeros(2, 1, 3)}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def layout_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    writer = TensorFileWriter(path, layout_of(tensors), metadata)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()


def test_the_official_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path / "a.safetensors", tensors, {"note": "ours"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ours"}


def test_we_read_what_the_official_library_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "a.safetensors", {"note": "theirs"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"note": "theirs"}
    assert file.specs == layout_of(tensors)
    assert all(same_bits(file.read(name), tensors[name]) for name in tensors)


def test_both_write_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in every_dtype().items() if name in {"F32", "BF16", "U8", "I64"}}
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_read_is_a_copy_and_may_be_changed(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(4)})
    file = TensorFile(tmp_path / "a")
    file.read("w").zero_()
    assert file.read("w").tolist() == [1.0] * 4


def test_strided_and_differentiable_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4).requires_grad_()
    write(tmp_path / "a", {"t": weight.T, "column": weight[:, 1]})
    assert torch.equal(load_file(tmp_path / "a")["t"], weight.detach().T)
    assert load_file(tmp_path / "a")["column"].tolist() == [1.0, 5.0, 9.0]


def test_an_interrupted_writer_is_taken_up(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(5), "b": torch.rand(3, 3), "c": torch.rand(2)}
    first = TensorFileWriter(tmp_path / "f", layout_of(tensors))
    first.write("b", tensors["b"])
    first.sync()
    del first  # never closed, as after a kill
    second = TensorFileWriter(tmp_path / "f", layout_of(tensors))
    assert torch.equal(second.read("b"), tensors["b"])
    second.write("a", tensors["a"])
    second.write("c", tensors["c"])
    second.close()
    loaded = load_file(tmp_path / "f")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_file_with_another_layout_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "f", {"a": torch.ones(4)})
    before = (tmp_path / "f").read_bytes()
    for other in ({"b": torch.ones(4)}, {"a": torch.ones(5)}, {"a": torch.ones(4).half()}):
        with pytest.raises(FormatError, match="another layout"):
            TensorFileWriter(tmp_path / "f", layout_of(other))
    assert (tmp_path / "f").read_bytes() == before


def test_the_whole_size_is_there_from_the_start(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1000)}
    TensorFileWriter(tmp_path / "f", layout_of(tensors)).close()
    size = (tmp_path / "f").stat().st_size
    write(tmp_path / "g", tensors)
    assert size == (tmp_path / "g").stat().st_size > 4000


@pytest.mark.parametrize("wrong", [torch.ones(5), torch.ones(2, 2), torch.ones(4).half()], ids=["5", "2x2", "half"])
def test_a_tensor_that_does_not_fit_the_layout_is_refused(tmp_path: Path, wrong: Tensor) -> None:
    writer = TensorFileWriter(tmp_path / "f", layout_of({"a": torch.ones(4)}))
    with pytest.raises(FormatError, match="a is torch"):
        writer.write("a", wrong)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_header(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {"w": entry()}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x02" + b"\0" * 6,
    "text": b"<!DOCTYPE html><html>Not Found</html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "header longer than the file": with_header(GOOD, length=10_000),
    "header longer than allowed": with_header(GOOD, length=2**63),
    "header cut off": with_header(json.dumps(GOOD).encode()[:-2]),
    "header is no text": with_header(b"\xff\xfe\xfd" * 10),
    "header is a list": with_header([GOOD]),
    "header is a number": with_header(7),
    "header is empty": with_header(b""),
    "header too deep": with_header(b"[" * 100_000),
    "data cut off": with_header(GOOD, data=b"\0" * 7),
    "no data": with_header(GOOD, data=b""),
    "entry is a list": with_header({"w": [1, 2]}),
    "entry is null": with_header({"w": None}),
    "no dtype": with_header({"w": {"shape": [2], "data_offsets": [0, 8]}}),
    "no shape": with_header({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "no offsets": with_header({"w": {"dtype": "F32", "shape": [2]}}),
    "unknown dtype": with_header({"w": entry(dtype="Q4")}),
    "dtype is a list": with_header({"w": entry(dtype=["F32"])}),
    "one offset": with_header({"w": entry(offsets=[0])}),
    "three offsets": with_header({"w": entry(offsets=[0, 8, 16])}),
    "offsets are no numbers": with_header({"w": entry(offsets=["a", "b"])}),
    "shape is a number": with_header({"w": entry(shape=2)}),
    "shape is null": with_header({"w": entry(shape=None)}),
    "too few bytes": with_header({"w": entry(offsets=[0, 4])}),
    "too many bytes": with_header({"w": entry(offsets=[0, 12])}, data=b"\0" * 12),
    "backwards": with_header({"w": entry(offsets=[8, 0])}),
    "before the data": with_header({"w": entry(offsets=[-8, 0])}),
    "negative shape": with_header({"w": entry(shape=[-1, -2])}),
    "past the end": with_header({"w": entry(offsets=[8, 16])}),
    "huge shape": with_header({"w": entry(shape=[2**62, 2**62])}),
    "overlapping": with_header({"v": entry(), "w": entry(offsets=[4, 12])}, data=b"\0" * 12),
    "twice the same bytes": with_header({"v": entry(), "w": entry()}),
    "metadata is a list": with_header({"__metadata__": [1], **GOOD}),
    "metadata is a number": with_header({"__metadata__": 3, **GOOD}),
}


def test_the_good_file_that_the_damaged_ones_derive_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(with_header(GOOD))
    assert TensorFile(tmp_path / "f").read("w").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_a_format_error_of_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "a folder"])
def test_a_path_that_is_no_file_is_a_format_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "f")
    with pytest.raises(FormatError, match="f: cannot be read: "):
        TensorFile(tmp_path / "f")


def test_a_file_cut_after_it_was_opened_is_a_format_error(tmp_path: Path) -> None:
    write(tmp_path / "f", {"w": torch.ones(4)})
    file = TensorFile(tmp_path / "f")
    with (tmp_path / "f").open("r+b") as handle:
        handle.truncate((tmp_path / "f").stat().st_size - 3)
    with pytest.raises(FormatError, match="ends 3 bytes early"):
        file.read("w")
