import json
from typing import ClassVar

import pytest
import torch

from compressllm.core.pattern import NM
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.kernels import measured, timing
from compressllm.kernels.dense import Dense
from compressllm.kernels.linear import SparseLinear, choose_backend
from compressllm.kernels.measured import TOKENS, Timings, example_like, measure, measuring, packed_past_caches

PATTERN = NM(2, 4)
pytestmark = pytest.mark.usefixtures("plain_backends")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.zeros(16, 32, dtype=torch.bfloat16)


@pytest.fixture
def fast(monkeypatch):
    """A backend that says it is slow by its rank, and is dense."""

    class Fast(Dense):
        """Pretends."""

        rank: ClassVar[int] = -3

    monkeypatch.setitem(BACKENDS._entries, "fast", Fast)


@pytest.fixture
def timings(tmp_path, monkeypatch):
    """Timings that make up what they measure, and what they said."""
    said = []

    def made_up(weight, pattern, backends):
        speed = {"dense": 10.0, "fast": 5.0, "reference": 50.0}
        return {name: dict.fromkeys(TOKENS, speed[name]) for name in backends}

    monkeypatch.setattr(measured, "measure", made_up)
    return Timings(tmp_path, said.append), said


def test_auto_takes_what_was_measured_fastest(weight, fast, timings):
    choice = choose_backend(weight, PATTERN, timings=timings[0])
    assert choice.name == "fast"
    assert choice.measured["dense"] == dict.fromkeys(TOKENS, 10.0)
    assert choice.refused["dense"] == "takes 2.00 times as long as fast at 1 token"
    assert choose_backend(weight, PATTERN).name == "dense"  # by rank


def test_measured_once_and_remembered_on_disk(weight, fast, timings, tmp_path, monkeypatch):
    first, said = timings
    choose_backend(weight, PATTERN, timings=first)
    assert said == ["measuring dense, fast on 16x32 bfloat16 2:4, once for this machine"]
    monkeypatch.setattr(measured, "measure", lambda *_: pytest.fail("measured again"))
    assert choose_backend(weight, PATTERN, timings=Timings(tmp_path)).name == "fast"
    (file,) = tmp_path.iterdir()
    assert list(json.loads(file.read_text())) == ["16x32 bfloat16 2:4"]


def test_another_kind_of_weight_or_machine_is_measured_anew(weight, fast, timings, monkeypatch, tmp_path):
    first, said = timings
    choose_backend(weight, PATTERN, timings=first)
    choose_backend(weight.float(), PATTERN, timings=first)
    choose_backend(weight, NM(1, 4), timings=first)
    choose_backend(quantize_absmax(weight, weight == 0, 4, 32), PATTERN, timings=first)
    assert len(said) == 4
    monkeypatch.setenv("COMPRESSLLM_ISA", "scalar")
    choose_backend(weight, PATTERN, timings=first)
    assert len(said) == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_a_backend_that_came_later_is_held_against_the_others(weight, timings, fast, monkeypatch):
    first, said = timings
    first.of(weight, PATTERN, ["dense", "fast"])
    first.of(weight, PATTERN, ["fast"])
    assert len(said) == 1
    assert first.of(weight, PATTERN, ["dense", "reference"])["reference"][1] == 50.0
    assert len(said) == 2


def test_damaged_or_read_only_memory_is_measured_anew(weight, fast, timings, tmp_path):
    first, said = timings
    choose_backend(weight, PATTERN, timings=first)
    next(tmp_path.iterdir()).write_text("[")
    assert choose_backend(weight, PATTERN, timings=first).name == "fast"
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    assert choose_backend(weight, PATTERN, timings=Timings(nowhere / "in", said.append)).name == "fast"
    assert len(said) == 3


def test_nothing_is_measured_where_there_is_no_choice(weight, timings):
    assert choose_backend(weight, PATTERN, timings=timings[0]).name == "dense"
    assert timings[1] == []


def test_measures_every_backend_at_growing_numbers_of_tokens(weight, monkeypatch):
    monkeypatch.setattr(timing, "working_set", lambda device, turns: 10_000)
    monkeypatch.setattr(measured, "_SECONDS", 0.0)
    found = measure(weight, PATTERN, ["dense", "reference"])
    assert found.keys() == {"dense", "reference"}
    assert all(tuple(times) == TOKENS and min(times.values()) > 0 for times in found.values())
    monkeypatch.setattr(measured, "_LONG", 0.0)
    assert list(measure(weight, PATTERN, ["dense"])["dense"]) == [1]


def test_copies_go_past_the_caches_and_share_no_memory(weight, monkeypatch):
    monkeypatch.setattr(timing, "working_set", lambda device, turns: 10_000)
    copies, size = packed_past_caches(Dense(), weight, PATTERN.keep(weight.float()))
    assert (len(copies), size) == (10, 1024)
    assert len({packed["weight"].data_ptr() for packed in copies}) == 10


def test_examples_are_of_the_same_kind(weight):
    example, keep = example_like(weight, PATTERN)
    assert (example.dtype, example.shape) == (weight.dtype, weight.shape)
    assert PATTERN.violations(keep) == 0
    assert not example[~keep].any()
    assert example[keep].all()
    quantized, _ = example_like(quantize_absmax(weight, weight == 0, 4, 32), PATTERN)
    assert isinstance(quantized, QuantizedWeight)
    assert (quantized.bits, quantized.group) == (4, 32)


def test_measuring_can_be_switched_off(monkeypatch):
    assert not measuring()  # as in all tests
    monkeypatch.delenv("COMPRESSLLM_MEASURE")
    assert measuring()


def test_a_dense_copy_is_used_from_its_number_of_tokens_on(monkeypatch):
    torch.manual_seed(0)
    weight, keep = example_like(torch.zeros(8, 16), PATTERN)
    both = SparseLinear(weight, keep, None, PATTERN, "reference", dense_from=4)
    ran = []
    monkeypatch.setattr(type(both._backend), "linear", lambda self, x, packed, bias: ran.append(len(x)) or x[:, :8])
    for tokens in (1, 3, 4, 9):
        got = both(torch.randn(tokens, 16))
        assert got.shape == (tokens, 8)
    assert ran == [1, 3]
    assert torch.equal(both.dense, weight)
    assert list(both.state_dict()) == ["weight"]
