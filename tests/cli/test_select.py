import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compressllm.select.extra import sklearn_missing

THINGS = ["the python loop", "a railway bridge", "the apple harvest"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"instruction": f"Tell me of {THINGS[one % 3]} {one}.", "output": "It is so. " * (1 + one % 4), "mine": one}
        for one in range(60)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:30], {"instruction": "bad"}, *rows[30:]]))
    return path


@pytest.fixture
def pruned(cli: Callable[..., Any], tiny: str, tmp_path: Path) -> Path:
    assert cli("prune", tiny, tmp_path / "pruned", "--method", "magnitude").code == 0
    return tmp_path / "pruned"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["random", "longest", "kd-gap"])
def test_writes_an_ordered_subset_and_a_report(
    cli: Callable[..., Any], data: Path, tiny: str, pruned: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "chosen.jsonl"
    student = ["--student", pruned] if method == "kd-gap" else []
    done = cli("select", data, out, "--teacher", tiny, *student, "--method", method, "--budget", "0.25", "--json")
    assert done.code == 0, done.err
    rows, report = read(out), json.loads((tmp_path / "chosen.report.json").read_text())
    assert done.json == report
    assert "left out 1 without a prompt or a response (first: 31)" in done.err
    assert report["data"]["left_out"] == {"without a prompt or a response": {"records": 1, "first_lines": [31]}}
    assert len(rows) == report["chosen"] == 15
    originals = data.read_text().splitlines()
    for row in rows:
        facts = row.pop("selection")
        assert row == json.loads(originals[facts["line"] - 1])
        assert facts["cost"] == facts["tokens"] ** 2
        assert facts["cluster"] is None
    scores = [row["selection"]["score"] for row in read(out)]
    assert scores == sorted(scores, reverse=True)
    again = cli(
        "select", data, tmp_path / "again.jsonl", "--teacher", tiny, *student, "--method", method, "--budget", "15"
    )
    assert again.code == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    assert "chose 15 of 60 records" in again.out


@pytest.mark.skipif(sklearn_missing() is not None, reason=f"paser {sklearn_missing()}")
def test_paser_reports_and_draws_its_clusters(
    cli: Callable[..., Any], data: Path, tiny: str, pruned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "chosen.jsonl"
    method = "{paser: {embedder: hidden, min_clusters: 3, max_clusters: 3}}"
    done = cli("select", data, out, "--teacher", tiny, "--student", pruned, "--method", method)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "chosen.report.json").read_text())
    rows = read(out)
    assert len(rows) == 12
    for cluster in report["clusters"]:
        assert cluster["phrases"]
        assert cluster["degradation"] > 0
        assert cluster["budget"] == sum(row["selection"]["cluster"] == cluster["cluster"] for row in rows)
        assert f"{cluster['degradation']:.4f}" in done.out
    svg = "{http://www.w3.org/2000/svg}"
    points = ElementTree.parse(tmp_path / "chosen.map.svg").getroot().findall(f"{svg}circle")
    assert len(points) == 60 + 3, "a point a record, and a cluster in the legend"
    bars = ElementTree.parse(tmp_path / "chosen.budget.svg").getroot().findall(f"{svg}rect")
    widths = sorted(float(bar.get("width") or 0) for bar in bars[1:])
    budgets = sorted(cluster["budget"] for cluster in report["clusters"])
    assert [width / widths[-1] for width in widths] == pytest.approx([one / budgets[-1] for one in budgets], abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--method": "pasr"}, "did you mean 'paser'"),
        ({"--method": "kd-gap"}, "give the pruned one as student"),
        ({"--budget": "0"}, "greater than 0"),
        ({"--budget": "2.5"}, "neither a fraction"),
        ({"out": "chosen.txt"}, "give a file name that ends so"),
        ({"out": "data.jsonl"}, "is there already"),
        ({"out": "none/chosen.jsonl"}, "is not a folder"),
        ({"data": "none.jsonl"}, "No such file"),
        ({"--teacher": "./none"}, "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    cli: Callable[..., Any], data: Path, tiny: str, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    given = {"data": "data.jsonl", "out": "chosen.jsonl", "--teacher": tiny, "--method": "random"} | change
    flags = [part for name, value in given.items() if name.startswith("--") for part in (name, value)]
    done = cli("select", tmp_path / given["data"], tmp_path / given["out"], *flags)
    assert done.code == 2
    assert message in done.err
    *before, last = done.err.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith("warning: ") for line in before)
    assert not (tmp_path / "chosen.report.json").exists()


def test_without_scikit_learn_it_says_what_to_install(
    cli: Callable[..., Any], data: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.select import paser

    monkeypatch.setattr(paser, "sklearn_missing", lambda: "needs scikit-learn and scipy; run: pip install x")
    done = cli("select", data, tmp_path / "out.jsonl", "--teacher", tiny, "--student", tiny)
    assert done.code == 2
    assert "selector paser needs scikit-learn and scipy; run: pip install x" in done.err


def test_list_shows_selectors_and_embedders(cli: Callable[..., Any]) -> None:
    assert "paser" in cli("list", "selectors").out
    assert "minilm" in cli("list", "embedders").out
