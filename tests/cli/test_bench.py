"""``compressllm bench``, with numbers that mean nothing: how they are shown, not how large they are."""

from xml.etree import ElementTree

import pytest


@pytest.fixture
def few_bytes(monkeypatch):
    """Nothing goes past the caches, so that it is quick."""
    monkeypatch.setattr("compressllm.kernels.timing.working_set", lambda device, turns: 1)
    monkeypatch.setattr("compressllm.bench.bandwidth.BYTES", 1 << 16)
    monkeypatch.setattr("compressllm.bench.layers.BYTES", 1 << 16)
    monkeypatch.setattr("compressllm.bench.bandwidth._SECONDS", 0.0)


def test_layers(cli, few_bytes, tmp_path):
    options = ("--tokens", "1,4", "--formats", "bf16,int4", "--backend", "reference", "--seconds", "0")
    done = cli("bench", "--layers", "64x128,32x256", *options, "--plot", tmp_path / "bars.svg", "--json")
    assert done.code == 0
    rows, dense = done.json["rows"], done.json["dense"]
    assert [(r["shape"], r["tokens"], r["format"], r["backend"]) for r in rows] == [
        (shape, tokens, form, "reference")
        for shape in ([64, 128], [32, 256])
        for tokens in (1, 4)
        for form in ("bf16", "int4")
    ]
    assert all(row[key] > 0 for row in rows for key in ("speedup", "speedup_best_dense", "bandwidth_share"))
    assert {row["best_dense"] for row in rows if row["format"] == "bf16"} <= {"linear float32", "linear bfloat16"}
    assert {row["backend"] for row in dense} >= {"linear float32", "linear bfloat16"}
    assert all(row["speedup"] == 1.0 for row in dense if row["format"] == "bf16")
    assert len([e for e in ElementTree.parse(tmp_path / "bars.svg").iter() if e.tag.endswith("rect")]) == 1 + len(
        rows
    ) + len(dense)


def test_layers_say_what_auto_takes_and_why_others_refuse(cli, few_bytes, monkeypatch, plain_backends):
    done = cli("bench", "--layers", "64x128", "--tokens", "1", "--seconds", "0")
    assert done.code == 0
    assert "auto takes dense for 64x128 bf16" in done.out
    assert "not reference: decodes the whole weight at every call" in done.out


def test_a_model(cli, few_bytes, tiny, tmp_path):
    options = ("--backend", "auto", "--batch", "1,2", "--prompt", "5", "--new-tokens", "3", "--seconds", "0")
    done = cli("bench", tiny, *options, "--plot", tmp_path / "bars.svg", "--json")
    assert done.code == 0
    assert [(row["backend"], row["batch"], row["step"]) for row in done.json["rows"]] == [
        ("dense", 1, "transformers"),
        ("auto", 1, "transformers"),
        ("dense", 2, "transformers"),
        ("auto", 2, "transformers"),
    ]
    assert all(row["seconds_per_step"]["rounds"] == 3 for row in done.json["rows"])
    assert "tokens a second" in (tmp_path / "bars.svg").read_text()
    assert "dense: no sparse linears" in cli("bench", tiny, *options).out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "bench needs a model or --layers"),
        (("MODEL", "--layers", "64x64"), "bench needs a model or --layers"),
        (("--layers", "64"), "cannot read '64'; give out x in"),
        (("--layers", "64x64", "--tokens", "0"), "cannot read '0'; give numbers"),
        (("--layers", "64x66"), "64x66: 66 inputs are not a multiple of 4, as 2:4 needs"),
        (("--layers", "64x64", "--formats", "int3"), "unknown format 'int3'"),
        (("--layers", "64x64", "--backend", "referense"), "did you mean 'reference'"),
        (("MODEL", "--step", "natife"), "unknown step 'natife'; known: native, transformers, compiled"),
        (("MODEL", "--backend", "reference:int3"), "cannot read 'reference:int3'"),
        (("MODEL", "--backend", "referense"), "did you mean 'reference'"),
    ],
)
def test_bad_input_is_one_line(cli, tiny, arguments, says):
    done = cli("bench", *(tiny if argument == "MODEL" else argument for argument in arguments))
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err


def test_inspect_shows_backends(cli, tiny, plain_backends):
    assert cli("inspect", tiny, "--backends", "--json").json["backends"] == {}
