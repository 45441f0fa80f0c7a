import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressllm.core.errors import FormatError
from compressllm.models.shards import ShardReader, ShardWriter, file_sha256
from compressllm.models.tensorfile import TensorSpec

INDEX = "model.safetensors.index.json"


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"embed": (10, 4), "a": (3, 4), "b": (2, 4), "norm": (4,), "big": (40, 4), "head": (10, 4)}
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


def layout_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], variant: str | None = None, limit: int = 10**9) -> None:
    writer = ShardWriter(folder, layout_of(tensors), variant, limit)
    for name in sorted(tensors):
        writer.write(name, tensors[name])
    writer.finish()


def test_one_small_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_shards_stay_below_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, limit=250)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    for name in names:
        held = load_file(tmp_path / name)
        assert held.keys() == {tensor for tensor, place in index["weight_map"].items() if place == name}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 250
    reader = ShardReader(tmp_path)
    assert reader.specs == layout_of(tensors)
    assert all(torch.equal(reader.read(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("limit", [250, 10**9])
def test_a_variant_is_in_every_name_and_must_be_asked_for(tmp_path: Path, limit: int) -> None:
    write(tmp_path, some_tensors(), "packed", limit)
    assert all(".packed" in path.name for path in tmp_path.iterdir())
    assert set(ShardReader(tmp_path, "packed").specs) == set(some_tensors())
    with pytest.raises(FormatError, match=r"holds no model\.safetensors"):
        ShardReader(tmp_path)


def test_an_interrupted_writer_is_taken_up(tmp_path: Path) -> None:
    tensors = some_tensors()
    first = ShardWriter(tmp_path, layout_of(tensors), max_shard_bytes=250)
    for name in ("big", "a"):
        first.write(name, tensors[name])
    first.close()
    assert not (tmp_path / INDEX).exists()
    second = ShardWriter(tmp_path, layout_of(tensors), max_shard_bytes=250)
    assert torch.equal(second.read("big"), tensors["big"])
    for name in tensors.keys() - {"big", "a"}:
        second.write(name, tensors[name])
    second.finish()
    reader = ShardReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensors[name]) for name in tensors)


def test_a_tensor_that_is_not_there_is_a_format_error(tmp_path: Path) -> None:
    write(tmp_path, some_tensors())
    with pytest.raises(FormatError, match="has no tensor nose"):
        ShardReader(tmp_path).read("nose")


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def only_pickled(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def drop_tensor(folder: Path) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    kept = load_file(path)
    del kept["a"]
    save_file(kept, path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda folder: (folder / "model-00003-of-00004.safetensors").unlink(), "00003.*is missing"),
    "truncated shard": (
        lambda folder: (folder / "model-00003-of-00004.safetensors").write_bytes(
            (folder / "model-00003-of-00004.safetensors").read_bytes()[:-1]
        ),
        "00003.*is truncated",
    ),
    "shard lacks a tensor": (drop_tensor, "lacks tensor a, which the index places in it"),
    "path escape": (edit_index(lambda i: i["weight_map"].update(a="../x.safetensors")), "outside its folder"),
    "absolute path": (edit_index(lambda i: i["weight_map"].update(a="/etc/passwd")), "outside its folder"),
    "parent folder": (edit_index(lambda i: i["weight_map"].update(a="..")), ".. "),
    "no name": (edit_index(lambda i: i["weight_map"].update(a="")), "outside its folder|is missing|cannot be read"),
    "null name": (edit_index(lambda i: i["weight_map"].update(a=None)), "is not a shard index"),
    "no weight map": (edit_index(lambda i: i.pop("weight_map")), "is not a shard index"),
    "map is a list": (edit_index(lambda i: i.update(weight_map=["a"])), "is not a shard index"),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[]"), "is not a shard index"),
    "index is not JSON": (lambda folder: (folder / INDEX).write_text("<html>\n</html>"), "is not JSON"),
    "index is not text": (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), "is not JSON"),
    "nothing": (remove_all, "holds no model.safetensors and no model.safetensors.index.json$"),
    "pickled weights only": (only_pickled, "holds pytorch_model.bin, and pickled weights are not read: convert them"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_a_format_error_of_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path, some_tensors(), limit=250)
    damage(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        ShardReader(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
