"""A comparison for machines that build: JUnit XML, and annotations of GitHub's workflows."""

from __future__ import annotations

from typing import NamedTuple
from xml.etree import ElementTree

from compressllm.report.accuracies import Accuracy
from compressllm.report.compare import Comparison, Line


class Judgement(NamedTuple):
    """One thing that the gate judged of one contender.

    Args:
        what: ``perplexity`` or ``accuracy``.
        case: The contender, and of an accuracy the task.
        verdict: As a `Line` or an `Accuracy` has it.
        sentence: What the gate says of it.
    """

    what: str
    case: str
    verdict: str
    sentence: str


def judgements(comparison: Comparison) -> list[Judgement]:
    """All that was judged, contender by contender."""
    found = []
    for line in comparison.lines[1:]:
        if line.verdict:
            found.append(Judgement("perplexity", line.name, line.verdict, _of_perplexity(comparison, line)))
        for before, one in zip(comparison.lines[0].accuracies, line.accuracies, strict=True):
            if one.verdict:
                words = _of_accuracy(comparison, line, before, one)
                found.append(Judgement("accuracy", f"{line.name} {one.task}", one.verdict, words))
    return found


def to_junit(comparison: Comparison) -> str:
    """One test case for each thing that was judged."""
    judged = judgements(comparison)
    suite = ElementTree.Element(
        "testsuite",
        name="compressllm compare",
        tests=str(len(judged)),
        failures=str(sum(one.verdict == "failed" for one in judged)),
        errors="0",
        skipped="0",
    )
    for one in judged:
        case = ElementTree.SubElement(suite, "testcase", classname=f"compressllm.{one.what}", name=one.case, time="0")
        if one.verdict == "failed":
            failure = ElementTree.SubElement(case, "failure", message=one.sentence)
            failure.text = comparison.protocol if one.what == "perplexity" else None
        else:
            ElementTree.SubElement(case, "system-out").text = one.sentence
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def github_lines(comparison: Comparison) -> list[str]:
    """Lines that a GitHub workflow shows beside its run: errors, and what is over the limit but within noise."""
    marked = {"failed": "error", "within noise": "warning"}
    lines = [
        f"::{marked[one.verdict]} title={one.what} {one.verdict}::{_escaped(one.sentence)}"
        for one in judgements(comparison)
        if one.verdict in marked
    ]
    return lines + [f"::warning title=compressllm compare::{_escaped(warning)}" for warning in comparison.warnings]


def _of_perplexity(comparison: Comparison, line: Line) -> str:
    first = comparison.lines[0]
    words = f"{line.name}: perplexity {line.perplexity:.4f} against {first.perplexity:.4f} of {first.name}"
    if line.rise:
        words += f", {line.rise.value:+.2%}"
        if line.paired:
            words += f" (at {comparison.confidence:.0%} between {line.rise.low:+.2%} and {line.rise.high:+.2%})"
    return f"{words}, where {comparison.allowed:.2%} is allowed: {line.verdict}"


def _of_accuracy(comparison: Comparison, line: Line, before: Accuracy, one: Accuracy) -> str:
    """Accuracies in percent, and changes of them in points."""
    name = "mean accuracy" if not one.metric else f"{one.task} {one.metric}"
    words = f"{line.name}: {name} {one.value:.2%} against {before.value:.2%} of {comparison.lines[0].name}"
    if one.drop and comparison.drop is not None:
        low, high = -100 * one.drop.high, -100 * one.drop.low
        words += (
            f", {-100 * one.drop.value:+.2f} points (between {low:+.2f} and {high:+.2f}), where a drop of "
            f"{100 * comparison.drop:.2f} is allowed"
        )
    return f"{words}: {one.verdict}"


def _escaped(words: str) -> str:
    return words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
