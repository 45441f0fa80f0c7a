"""``compressllm contextual`` and ``generate --contextual`` on the trained tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

FEW = ("--windows", 2, "--seqlen", 96, "--prompt-tokens", 24, "--new-tokens", 12, "--probes", 1)


def test_calibrates_measures_and_generates(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = cli(
        "contextual", tiny, out, "--selector", "cats", "--density", 0.5, "--curve", 0.9, "--data", text,
        "--calibration", text, "--correct", "{sirius: {period: 4, rule: exact}}", *FEW,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert all(word in made.out for word in ("cats", "corrected", "sparse"))
    (stage,) = json.loads((out / "manifest.json").read_text())["stages"]
    rows = stage["metrics"]["tradeoff"]
    assert [(row["kind"], row["density"]) for row in rows] == [
        ("dense", 1.0), ("sparse", 0.5), ("corrected", 0.5), ("sparse", 0.9), ("corrected", 0.9)
    ]  # fmt: skip
    for row in rows:
        if row["kind"] == "corrected":
            assert row["exact_match"] == 1, "exactly corrected texts are the dense ones"
            assert row["quality"] == rows[0]["quality"]
    assert rows[1]["effective_density"] < rows[3]["effective_density"] < 1
    assert rows[1]["perplexity"] > rows[3]["perplexity"] > 0.9 * rows[0]["perplexity"]
    assert (out / "model" / "contextual-cats.safetensors").exists()
    assert cli("verify", out).code == 0

    continued = ("--prompt", "The ", "--max-new-tokens", 12)
    plain = cli("generate", out, *continued, "--json").json
    drafted = cli("generate", out, *continued, "--contextual", "cats", "--correct", "{sirius: {rule: exact}}", "--json")
    assert drafted.code == 0, drafted.err
    assert drafted.json["text"] == plain["text"]
    assert drafted.json["effective_density"] > 0
    spoken = cli("generate", out, *continued, "--contextual", "cats")
    assert spoken.out.startswith("The ")
    assert "effective density" in spoken.err


def test_what_does_not_go_together_is_one_line(cli: Callable, tiny: str, tmp_path: Path) -> None:
    for arguments, words in (
        (("--contextual", "griffen"), "did you mean 'griffin'"),
        (("--contextual", "cats"), "compressllm contextual"),
        (("--contextual", "griffin", "--density", 0), "density 0"),
        (("--contextual", "griffin", "--fast"), "--fast"),
        (("--correct", "sirius"), "--contextual"),
        (("--contextual", "griffin", "--correct", "{sirius: {period: 0}}"), "period 0"),
    ):
        wrong = cli("generate", tiny, "--prompt", "x", "--max-new-tokens", 2, *arguments)
        assert wrong.code == 2, arguments
        assert words in wrong.err
        assert wrong.err.count("\n") == 1
    wrong = cli("contextual", tiny, tmp_path / "out", "--density", 1.5)
    assert wrong.code == 2
    assert "density" in wrong.err
