import gc
import mmap
import sys

import pytest
import torch

from compressllm.kernels.native import pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")


def test_small_tensors_share_a_mapping_and_no_bytes():
    made = [pages.zeros((7, 11), torch.int32) for _ in range(5)]
    for number, tensor in enumerate(made):
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert [int(tensor.sum()) for tensor in made] == [77 * (n + 1) for n in range(5)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in made)
    assert made[-1].data_ptr() - made[0].data_ptr() < 5 * 77 * 4 * 2


def test_empty_and_large():
    assert pages.zeros((0, 4), torch.float32).shape == (0, 4)
    large = pages.zeros((20 << 20,), torch.uint8)
    assert large.data_ptr() % pages.HUGE_PAGE == 0
    assert not large.any()


@linux
def test_a_mapping_goes_with_its_tensors():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    large = pages.zeros((64 << 20,), torch.uint8).fill_(1)
    part = large[-8:]
    del large
    gc.collect()
    assert resident() - before > 60 << 20  # a view holds it
    assert int(part.sum()) == 8
    del part
    gc.collect()
    assert resident() - before < 30 << 20


@linux
def test_pages_are_huge_where_the_system_allows():
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        if "[never]" in file.read():
            pytest.skip("switched off on this system")
    tensor = pages.zeros((32 << 20,), torch.uint8).fill_(1)
    assert pages.huge_bytes(tensor) >= 30 << 20
    # Memory of our own that is told not to: what malloc hands out may lie in huge pages on any system.
    small = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    small.madvise(mmap.MADV_NOHUGEPAGE)
    assert pages.huge_bytes(torch.frombuffer(small, dtype=torch.uint8).fill_(1)) == 0
