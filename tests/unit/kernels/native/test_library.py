import warnings

import pytest

from compressllm.core.errors import BackendUnavailableError
from compressllm.kernels.native import bf16
from compressllm.kernels.native import library as module
from compressllm.kernels.native.library import Kernel, library, shares_threads, unavailable


def test_runs_on_torchs_threads():
    loaded = library()
    if loaded.build.openmp is None:
        pytest.skip(loaded.build.no_openmp)
    assert shares_threads(loaded)


def test_the_highest_instruction_set_is_chosen():
    loaded = library()
    with_kernel = [isa for isa in loaded.isas if loaded._address("bf16", isa)]
    assert loaded.kernel("bf16").isa == with_kernel[-1]
    assert set(loaded.refused).isdisjoint(loaded.isas)


def test_an_instruction_set_can_be_forced(monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_ISA", "scalar")
    loaded = library()
    assert loaded.isas == ("scalar",)
    assert loaded.kernel("bf16").isa == "scalar"
    monkeypatch.setenv("COMPRESSLLM_ISA", "sse9")
    assert unavailable() == f"COMPRESSLLM_ISA=sse9: is none of {_all()}; usable here: {', '.join(_usable(monkeypatch))}"


def _all() -> str:
    return "scalar, neon, avx2, avx512, avx512vnni, amx"


def _usable(monkeypatch) -> tuple[str, ...]:
    monkeypatch.delenv("COMPRESSLLM_ISA")
    return library().isas


def test_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_NATIVE", "0")
    assert unavailable() == "switched off by COMPRESSLLM_NATIVE=0"
    with pytest.raises(BackendUnavailableError, match="switched off"):
        library()


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    """The kernel of a higher instruction set is given the inputs' preparation of none, and so sees no inputs."""
    loaded = library()
    fresh = module.Library(loaded.build, loaded.c, ("scalar", "wrong"), {})
    right = module.Library._address

    def address(self, format, isa):
        return right(self, format, "scalar") if isa == "scalar" else _idle(loaded)

    monkeypatch.setattr(module.Library, "_address", address)
    with pytest.warns(RuntimeWarning, match="bf16 kernel for wrong is not used: it is off by"):
        assert fresh.kernel("bf16").isa == "scalar"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh.kernel("bf16").isa == "scalar"  # checked once


def _idle(loaded) -> Kernel:
    """A kernel whose C function adds nothing to the sums."""
    import ctypes

    right = loaded.kernel("bf16")
    return Kernel("bf16", "wrong", right.format, ctypes.cast(loaded.c.threads, ctypes.c_void_p).value, 32)


def test_every_usable_kernel_passes_its_check():
    loaded = library()
    oracle = loaded.kernel("bf16", "scalar")
    for isa in loaded.isas:
        if kernel := loaded._address("bf16", isa):
            assert module.differs(loaded, kernel, oracle) is None


def test_a_format_that_is_not_there():
    with pytest.raises(BackendUnavailableError, match="has no bf17_tile_scalar"):
        library().kernel("bf17")
    assert bf16.linear  # the format that is
