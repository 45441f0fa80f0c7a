"""Some of the damaged inputs of ``benchmarks/fuzz.py``, which reads thousands."""

from pathlib import Path

import pytest

CASES = range(150)  # ten of every input


def test_damaged_inputs_end_well_or_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from fuzz import fuzz

    fuzzer = fuzz(CASES, tmp_path, more_bytes=None)
    assert fuzzer.failures == []
    assert all(sum(counts.values()) == len(CASES) / len(fuzzer.inputs) for counts in fuzzer.counts.values())
    assert sum(counts["refused"] for counts in fuzzer.counts.values()) > len(CASES) / 3
