from pathlib import Path

import pytest
import torch

from compressllm.core.masks import MaskStore, PackedMask, pack_bits, put_kept, raw, take_kept, unpack_bits


def random_keep(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4


def test_the_lowest_bit_is_the_lowest_column() -> None:
    keep = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    assert pack_bits(keep).tolist() == [[0x96], [0x01]]


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 20, 63, 64])
def test_bits_round_trip_for_any_number_of_columns(columns: int) -> None:
    keep = random_keep(5, columns)
    bits = pack_bits(keep)
    slowly = [
        [sum(2**bit for bit in range(8) if at + bit < columns and row[at + bit]) for at in range(0, columns, 8)]
        for row in keep.tolist()
    ]
    assert bits.dtype == torch.uint8
    assert bits.tolist() == slowly
    assert torch.equal(unpack_bits(bits, columns), keep)
    assert PackedMask(bits, columns).kept() == keep.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_kept_values_round_trip_bit_for_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    weight[0, :4] = torch.tensor([-0.0, float("nan"), 1e-30, -1.0])
    weight, keep = weight.to(dtype), random_keep(6, 20)
    keep[0, :4] = True
    values = take_kept(weight, keep)
    assert (values.dtype, values.shape) == (dtype, (keep.sum(),))
    expected = raw(weight).clone()
    expected[~keep] = 0  # the bits of +0.0
    assert torch.equal(raw(put_kept(values, keep)), expected)


def test_a_store_holds_masks_in_order_at_one_bit_a_weight() -> None:
    store = MaskStore()
    masks = {"b": random_keep(4, 20, 1), "a": random_keep(3, 16, 2)}
    for name, keep in masks.items():
        store[name] = keep
    assert list(store) == ["b", "a"]
    assert len(store) == 2
    assert all(torch.equal(store[name], keep) for name, keep in masks.items())
    assert store.packed("b").bits.numel() == 4 * 3
    kept = sum(int(keep.sum()) for keep in masks.values())
    assert store.sparsity() == pytest.approx(1 - kept / (4 * 20 + 3 * 16))
    assert MaskStore().sparsity() == 0.0


def test_a_copy_is_a_store_of_its_own() -> None:
    store = MaskStore()
    store["a"] = random_keep(4, 8)
    copied = store.copy()
    copied["b"] = random_keep(4, 8)
    assert (list(store), list(copied)) == (["a"], ["a", "b"])


@pytest.mark.parametrize("wrong", [torch.ones(4, 8), torch.ones(8).bool(), torch.ones(2, 4, 8).bool()], ids=str)
def test_only_bool_matrices_are_masks(wrong: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="a mask is"):
        MaskStore()["q"] = wrong


def test_hash_depends_on_names_shapes_and_bits_but_not_on_order() -> None:
    def sha256(**masks: torch.Tensor) -> str:
        store = MaskStore()
        for name, keep in masks.items():
            store[name] = keep
        return store.sha256()

    a, b = random_keep(4, 20, 1), random_keep(4, 20, 2)
    other = a.clone()
    other[3, 19] = ~other[3, 19]
    assert sha256(a=a, b=b) == sha256(b=b, a=a)
    assert len({sha256(a=a, b=b), sha256(a=b, b=a), sha256(a=a), sha256(a=other, b=b), sha256(c=a, b=b)}) == 5
    # the padding of the last byte hides neither a column nor a row
    assert sha256(a=torch.zeros(1, 15).bool()) != sha256(a=torch.zeros(1, 16).bool())
    assert sha256(a=torch.zeros(1, 16).bool()) != sha256(a=torch.zeros(2, 8).bool())


def test_masks_written_to_a_file_are_the_stored_bits(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from compressllm.models.checkpoint import write_masks

    store = MaskStore()
    store["model.q"], store["model.k"] = random_keep(4, 20), random_keep(3, 16)
    write_masks(tmp_path / "masks.safetensors", store)
    stored = load_file(tmp_path / "masks.safetensors")
    assert {name: bits.tolist() for name, bits in stored.items()} == {
        name: store.packed(name).bits.tolist() for name in store
    }
