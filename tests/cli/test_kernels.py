import pytest

from compressllm.kernels.native.library import unavailable


def test_info_says_what_runs_and_why_the_rest_does_not(cli):
    if reason := unavailable():
        pytest.skip(reason)
    facts = cli("kernels", "info", "--json").json
    assert facts["available"] is True
    assert facts["chosen"]["bf16"] in facts["usable"]
    assert facts["threads"] >= 1
    assert facts["refused"]
    assert not set(facts["usable"]) & set(facts["refused"])
    shown = cli("kernels", "info").out
    assert facts["library"] in shown
    assert facts["compiler"] in shown
    assert all(f"{isa}: {reason}" in shown for isa, reason in facts["refused"].items())


def test_info_without_kernels(cli, monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_NATIVE", "0")
    facts = cli("kernels", "info", "--json").json
    assert facts["available"] is False
    assert facts["reason"] == "switched off by COMPRESSLLM_NATIVE=0"
    assert "switched off" in cli("kernels", "info").out


def test_build_prints_the_library(cli, monkeypatch):
    if not unavailable():
        assert cli("kernels", "build").out.strip().endswith("kernels.so")
    monkeypatch.setenv("COMPRESSLLM_NATIVE", "0")
    outcome = cli("kernels", "build")
    assert outcome.code == 2
    assert "switched off by COMPRESSLLM_NATIVE=0" in outcome.err
