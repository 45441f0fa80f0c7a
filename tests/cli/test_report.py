"""``compressllm report`` and ``compressllm compare`` of a real run, as a user would have it."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

EVAL = ("--windows", 12, "--seqlen", 64)
RECIPE = """\
model: {model}
stages:
  - eval: {{source: {text}, windows: 12, seqlen: 64}}
  - prune: {{method: magnitude, pattern: 2:4}}
  - recover: {{teacher: {model}, data: [{text}], seqlen: 64, max_tokens: 1024, batch_tokens: 256, masking: ast,
      refresh: 1}}
  - export: {{format: packed}}
  - eval: {{source: {text}, windows: 12, seqlen: 64}}
"""


def test_from_a_run_to_its_page_its_card_and_a_gate(
    cli: Callable, tiny: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.format(model=tiny, text=text))
    manifest = cli("run", recipe, run, "--json").json
    dense, *_, sparse = (stage["metrics"] for stage in manifest["stages"])
    prune = manifest["stages"][1]
    assert len(prune["block_seconds"]) > 1
    assert {name.rsplit(".", 1)[0] for name in prune["block_seconds"]} == {"model.layers"}
    assert all(took > 0 for took in prune["block_seconds"].values())

    done = cli("report", run, "--html", tmp_path / "out.html", "--md", tmp_path / "out.md")
    assert done.code == 0, done.err
    page, words = (tmp_path / "out.html").read_text(), (tmp_path / "out.md").read_text()
    for title in ("Relative output error", "Seconds", "Training loss", "Share of the mask that changed"):
        assert title in page
    assert f"{dense['perplexity']:.4g} → {sparse['perplexity']:.4g}" in words
    assert cli("report", run).code == 2
    assert cli("report", tmp_path, "--md", tmp_path / "x.md").code == 2

    card = (run / "model" / "README.md").read_text()
    assert f"{sparse['perplexity']:.4f}" in card  # measured after the export, and yet in its card
    assert manifest["stages"][3]["sha256"]["model.packed.safetensors"] in card
    assert 'variant="packed"' in card

    before = tmp_path / "dense.json"
    before.write_text(cli("eval", tiny, "--data", text, *EVAL, "--json").out)
    junit = tmp_path / "junit.xml"
    gate = ("--max-ppl-increase", "2%", "--junit", junit, "--annotate")
    worse = cli("compare", before, run, *gate)
    assert worse.code == 1, worse.err
    assert "::error title=perplexity failed::" in worse.err
    assert ElementTree.parse(junit).getroot().find("testsuite").get("failures") == "1"
    better = cli("compare", run, before, *gate, "--json")
    assert better.code == 0, better.err
    assert better.json["rows"][1]["verdict"] == "passed"
    assert better.json["rows"][1]["rise"]["high"] < 0
    assert "::" not in better.err
    assert cli("report", run, "--md", tmp_path / "beside.md", "--against", before).code == 0
    assert f"| {sparse['perplexity'] / dense['perplexity'] - 1:+.2%} |" in (tmp_path / "beside.md").read_text()
    table = cli("compare", before, run)
    assert table.code == 0
    assert f"{sparse['perplexity'] / dense['perplexity'] - 1:+.2%}" in table.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "needs another one to compare it with"),
        (("B", "--confidence", 0.2), "--confidence 0.2: give a share above 0.5"),
        (("B", "--max-ppl-increase", "much"), "--max-ppl-increase much: give a percentage"),
        (("B", "--junit", "x.xml"), "give --max-ppl-increase or --max-acc-drop too"),
        (("B",), "cannot be read"),
    ],
)
def test_compare_says_what_is_wrong_in_one_line(cli: Callable, options: tuple, message: str) -> None:
    done = cli("compare", "no-such-file", *options)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_baselines_keep_losses_by_window(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    assert cli("eval", tiny, "--data", text, *EVAL, "--write-baseline", baseline).code == 0
    assert len(json.loads(baseline.read_text())["measurements"][0]["window_nll"]) == 12
