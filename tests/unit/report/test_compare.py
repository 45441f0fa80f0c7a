"""Comparing, and what builds are told of it."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from compressllm.core.errors import CompressError
from compressllm.report.ci import github_lines, sentence, to_junit
from compressllm.report.compare import Contender, compare, read_contender

WINDOWS = list(2.0 + 0.4 * np.random.default_rng(0).standard_normal(40))


@pytest.fixture
def measured(measurement):
    """``measured("b", 0.02)``: a contender whose perplexity is so much above the first's, windows with noise."""

    def make(name: str, rise: float = 0.0, noise: float = 0.0, **changes) -> Contender:
        scatter = np.random.default_rng(7).standard_normal(len(WINDOWS))
        added = np.log1p(rise) + noise * (scatter - scatter.mean())
        return Contender(name, [measurement([float(x) for x in WINDOWS + added], **changes)], {})

    return make


def test_verdicts(measured):
    found = compare([measured("a"), measured("same"), measured("worse", 0.03, 0.01)], allowed=0.02)
    assert [line.verdict for line in found.lines] == [None, "passed", "failed"]
    assert [line.name for line in found.failed] == ["worse"]
    assert found.lines[2].rise.low > 0.02
    noisy = compare([measured("a"), measured("noisy", 0.03, 0.2)], allowed=0.02)
    assert noisy.lines[1].rise.value > 0.02
    assert noisy.lines[1].verdict == "within noise"
    assert not noisy.failed
    assert compare([measured("a"), measured("b", 5.0)]).lines[1].verdict is None


def test_without_losses_by_window_the_value_itself_is_judged_and_that_is_said(measured):
    found = compare([measured("a"), measured("b", 0.03, 0.2, window_nll=None)], allowed=0.02)
    assert found.lines[1].verdict == "failed"
    assert not found.lines[1].paired
    assert "b: there are no losses by window on both sides" in found.warnings[0]


def test_ruined_models_fail(measured):
    ruined = {"perplexity": float("inf"), "window_nll": None}
    assert compare([measured("a", **ruined), measured("b", **ruined)], allowed=0.5).lines[1].verdict == "failed"


def test_few_windows_are_warned_of(measurement):
    pair = [Contender(name, [measurement([2.0, 2.1])], {}) for name in "ab"]
    assert "2 windows are few" in compare(pair).warnings[0]


def test_the_last_common_text_is_compared(measurement):
    """A run that evaluates two texts, and one that has but the first."""
    first = [measurement([1.0] * 12, ids_sha256="x"), measurement([2.0] * 12, ids_sha256="y")]
    other = [measurement([1.5] * 12, ids_sha256="x"), measurement([9.0] * 12, ids_sha256="z")]
    found = compare([Contender("a", first, {}), Contender("b", other, {})])
    assert found.lines[0].perplexity == first[0]["perplexity"]
    assert found.lines[1].rise.value == pytest.approx(np.exp(0.5) - 1)


def test_other_texts_and_settings_do_not_compare(measured):
    with pytest.raises(CompressError, match=r"b: was not measured .* \(seqlen, dtype differ\)"):
        compare([measured("a"), measured("b", seqlen=9, dtype="bfloat16")])
    with pytest.raises(CompressError, match="b: holds no perplexity; add an eval stage"):
        compare([measured("a"), Contender("b", [], {})])


def test_reads_run_folders_and_files(run_folder, tmp_path, measurement):
    run = read_contender(str(run_folder))
    assert len(run.measured) == 2
    assert run.facts == {
        "sparsity": 0.5,
        "bytes_after": 2.5e6,
        "seconds": pytest.approx(5 * 61.5),
        "peak_memory_bytes": 512_000_000,
    }
    one = measurement(WINDOWS)
    (tmp_path / "eval.json").write_text(json.dumps(one))
    (tmp_path / "baseline.json").write_text(json.dumps({"version": 1, "measurements": [one]}))
    assert read_contender(str(tmp_path / "eval.json")).measured == [one]
    assert read_contender(str(tmp_path / "baseline.json")).measured == [one]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "holds no perplexity"), ("[]", "holds no perplexity"), ("no", "holds no perplexity")],
)
def test_files_that_hold_none(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CompressError, match=message):
        read_contender(str(tmp_path / "x.json"))
    with pytest.raises(CompressError, match="cannot be read"):
        read_contender(str(tmp_path / "none.json"))
    with pytest.raises(CompressError, match="is no run folder"):
        read_contender(str(tmp_path))


def test_junit_is_read_by_an_xml_parser(measured):
    found = compare([measured("a"), measured("fine"), measured('<bad & "ugly">', 0.05)], allowed=0.02)
    suite = ElementTree.fromstring(to_junit(found)).find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    fine, bad = suite.findall("testcase")
    assert (fine.get("name"), bad.get("name")) == ("fine", '<bad & "ugly">')
    assert fine.find("failure") is None
    assert "+5.00%" in bad.find("failure").get("message")


def test_annotations_are_one_escaped_line_each(measured):
    contenders = [measured("a"), measured("fine"), measured("noisy", 0.03, 0.2), measured("two\nlines", 0.05)]
    found = compare(contenders, allowed=0.02)
    warning, error = github_lines(found)
    assert warning.startswith("::warning title=perplexity within noise::noisy: ")
    assert error.startswith("::error title=perplexity failed::two%0Alines: ")
    assert "+5.00%25" in error
    assert "\n" not in error
    assert sentence(found, found.lines[1]).endswith("where 2.00% is allowed: passed")
