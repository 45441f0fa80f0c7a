"""Comparing, and what builds are told of it."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from compressllm.core.errors import CompressError
from compressllm.eval.accuracy import Drop
from compressllm.report.accuracies import Accuracy
from compressllm.report.beside import beside_section
from compressllm.report.ci import github_lines, judgements, to_junit
from compressllm.report.compare import Comparison, Line, compare
from compressllm.report.contender import Contender, read_contender

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


def test_a_section_shows_the_same(measured):
    found = compare([measured("a"), measured("b", 0.03, 0.01)])
    section = beside_section(found)
    first, second = section.tables[0].rows
    assert first[:4] == ["a", f"{found.lines[0].perplexity:.4g}", "", ""]
    assert second[2] == f"{found.lines[1].rise.value:+.2%}"
    assert second[3] == f"{found.lines[1].rise.low:+.2%} to {found.lines[1].rise.high:+.2%}"
    bars = [
        one for one in ElementTree.fromstring(section.pictures[0].svg).iter() if one.get("class") in {"bar", "rival"}
    ]
    widths = [float(bar.get("width")) for bar in bars]
    assert widths[1] / widths[0] == pytest.approx(1.03, rel=1e-3)


def test_a_section_of_tasks_alone():
    fell = Accuracy("arc_easy", "acc", 0.5, 0.02, Drop(0.04, 0.01, 0.07), True, None)
    was = replace(fell, value=0.54, drop=None)
    lines = [Line(name, None, None, False, None, [one], {}) for name, one in (("a", was), ("b", fell))]
    section = beside_section(Comparison(lines, "", None, None, 0.95, ["few items"]))
    assert not section.pictures
    assert "few items" in section.words
    assert section.tables[1].rows == [
        ("arc_easy acc", "a", "54.00 ± 2.00", "", ""),
        ("arc_easy acc", "b", "50.00 ± 2.00", "-4.00", "-7.00 to -1.00"),
    ]


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
    assert judgements(found)[0].sentence.endswith("where 2.00% is allowed: passed")


def task(correct: str, **changes) -> dict:
    """A task's result from its items' scores, ``"1101"``."""
    scores = [int(one) for one in correct]
    value = sum(scores) / len(scores)
    acc = {"value": value, "stderr": (value * (1 - value) / (len(scores) - 1)) ** 0.5}
    found = {
        "metrics": {"acc": acc},
        "items": len(scores),
        "num_fewshot": 0,
        "items_sha256": "x",
        "scores": {"acc": scores},
    }
    return found | changes


def asked(name: str, **tasks: dict) -> Contender:
    return Contender(name, [], {}, tasks)


def test_accuracies_are_judged_task_by_task_and_on_the_mean():
    first = asked("a", arc=task("1100" * 100), piqa=task("1000" * 100))
    same = asked("same", arc=task("1100" * 100), piqa=task("1000" * 100))
    worse = asked("worse", arc=task("1100" * 80 + "0000" * 20), piqa=task("1000" * 100))
    found = compare([first, same, worse], drop=0.01)
    assert [one.task for one in found.lines[0].accuracies] == ["arc", "piqa", "mean"]
    assert [one.verdict for one in found.lines[1].accuracies] == ["passed"] * 3
    arc, piqa, mean = found.lines[2].accuracies
    assert (arc.drop.value, piqa.drop.value, mean.drop.value) == pytest.approx((0.1, 0, 0.05))
    assert (arc.verdict, piqa.verdict, mean.verdict) == ("failed", "passed", "failed")
    assert [line.name for line in found.failed] == ["worse"]
    assert found.lines[2].perplexity is None
    assert [(one.case, one.verdict) for one in judgements(found)][3:5] == [
        ("worse arc", "failed"),
        ("worse piqa", "passed"),
    ]
    assert "worse: arc acc 40.00% against 50.00% of a, -10.00 points" in judgements(found)[3].sentence
    assert not compare([first, worse]).failed  # nothing is asked


def test_what_chance_may_do_to_an_accuracy_passes():
    first, noisy = asked("a", arc=task("1100" * 25)), asked("b", arc=task("0101" + "1010" + "1100" * 22 + "1000"))
    (one,) = compare([first, noisy], drop=0.005).lines[1].accuracies
    assert one.drop.value > 0.005
    assert one.verdict == "within noise"


def test_many_tasks_are_held_to_a_wider_bound_each():
    """So that the chance that any of them fails by chance does not grow with their number."""
    worse = {"before": task("1" * 200), "after": task("0" * 7 + "1" * 193)}
    alone = compare([asked("a", x=worse["before"]), asked("b", x=worse["after"])], drop=0.01).lines[1].accuracies
    others = {f"t{at}": task("10" * 100) for at in range(9)}
    among = compare([asked("a", x=worse["before"], **others), asked("b", x=worse["after"], **others)], drop=0.01)
    assert alone[0].drop.low > among.lines[1].accuracies[0].drop.low


def test_without_scores_of_items_accuracies_compare_as_if_of_different_ones():
    first, other = asked("a", arc=task("10" * 200)), asked("b", arc=task("10" * 200, scores={}))
    found = compare([first, other], drop=0.01)
    assert not found.lines[1].accuracies[0].paired
    assert found.lines[1].accuracies[0].drop.high > 0.05
    assert "b: there are no scores of single items" in found.warnings[0]


def test_other_items_do_not_compare(measured):
    first = asked("a", arc=task("10" * 20))
    with pytest.raises(CompressError, match="was asked other items of arc than a, or in another way"):
        compare([first, asked("b", arc=task("10" * 20, items_sha256="y"))])
    with pytest.raises(CompressError, match="b: has no task in common with a"):
        compare([first, asked("b", piqa=task("10" * 20))], drop=0.01)
    with pytest.raises(CompressError, match="holds no perplexity"):  # the tasks alone do not answer that
        compare([first, asked("b", arc=task("10" * 20))], allowed=0.01)


def test_perplexity_and_accuracy_are_gates_of_their_own(measured):
    contenders = [
        Contender(one.name, one.measured, {}, {"arc": task("1100" * 100)})
        for one in (measured("a"), measured("b", 0.05))
    ]
    found = compare(contenders, allowed=0.02, drop=0.01)
    assert found.lines[1].verdict == "failed"
    assert found.lines[1].accuracies[0].verdict == "passed"
    assert found.failed
    suite = ElementTree.fromstring(to_junit(found)).find("testsuite")
    assert [case.get("classname") for case in suite] == ["compressllm.perplexity", "compressllm.accuracy"]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert compare(contenders, drop=0.01).failed == []


def test_a_task_without_an_accuracy_is_left_out_and_that_is_said():
    words = {"metrics": {"word_perplexity": {"value": 20.0, "stderr": None}}, "items_sha256": "x"}
    found = compare([asked("a", wiki=words, arc=task("10")), asked("b", wiki=words, arc=task("10"))], drop=0.01)
    assert [one.task for one in found.lines[1].accuracies] == ["arc"]
    assert found.warnings == ["wiki: has no accuracy, so it is not compared"]


def test_reads_tasks(tmp_path):
    (tmp_path / "tasks.json").write_text(json.dumps({"schema": 1, "tasks": {"arc": task("10")}}))
    assert read_contender(str(tmp_path / "tasks.json")).tasks["arc"]["items"] == 2
