from pathlib import Path

import torch

from compressllm.core.run import Run
from compressllm.select.batches import by_length, in_batches
from compressllm.select.vectorcache import VectorCache, content_key

KEYS = [content_key(one) for one in range(5)]


def test_gives_back_what_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "made" / "cache.bin"
    vectors = torch.randn(3, 4)
    VectorCache(path, 4).append(KEYS[:2], vectors[:2])
    VectorCache(path, 4).append(KEYS[2:3], vectors[2:])
    again = VectorCache(path, 4)
    assert torch.equal(again.get([KEYS[2], KEYS[0]]), vectors[[2, 0]])  # type: ignore[arg-type]
    assert again.get([KEYS[0], KEYS[4]]) is None


def test_half_a_row_of_a_killed_process_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    vectors = torch.randn(3, 4)
    VectorCache(path, 4).append(KEYS[:2], vectors[:2])
    with path.open("ab") as file:
        file.write(b"half a row")
    VectorCache(path, 4).append(KEYS[2:3], vectors[2:])
    again = VectorCache(path, 4)
    assert torch.equal(again.get(KEYS[:3]), vectors)  # type: ignore[arg-type]


def test_nothing_is_kept_without_a_path() -> None:
    cache = VectorCache(None, 4)
    cache.append(KEYS[:1], torch.zeros(1, 4))
    assert cache.get(KEYS[:1]) is None


def test_batches_hold_like_lengths_and_so_many_tokens() -> None:
    lengths = [5, 1, 9, 2, 2, 30, 5]
    batches = by_length(lengths, 10)
    assert batches == [[1, 3, 4], [0, 6], [2], [5]]
    assert by_length([], 10) == []


def test_only_unfinished_batches_are_computed_again(tmp_path: Path, monkeypatch: object) -> None:
    import pytest

    assert isinstance(monkeypatch, pytest.MonkeyPatch)
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path))
    lengths = [200] * 6  # two in a batch of 512 tokens
    keys = [content_key("item", one) for one in range(6)]
    calls: list[list[int]] = []

    def compute(batch: list[int], fail_at: int | None = None) -> torch.Tensor:
        if fail_at in batch:
            raise KeyboardInterrupt
        calls.append(list(batch))
        return torch.tensor([[float(one), one + 0.5] for one in batch])

    def run(fail_at: int | None = None) -> torch.Tensor:
        return in_batches(
            lambda batch: compute(list(batch), fail_at), lengths, keys, 2, ("test",), torch.device("cpu"), Run(), "x"
        )

    with pytest.raises(KeyboardInterrupt):
        run(fail_at=4)
    assert calls == [[0, 1], [2, 3]]
    assert run().tolist() == [[one, one + 0.5] for one in range(6)]
    assert calls == [[0, 1], [2, 3], [4, 5]]
    run()
    assert len(calls) == 3
