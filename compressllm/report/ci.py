"""A comparison for machines that build: JUnit XML, and annotations of GitHub's workflows."""

from __future__ import annotations

from xml.etree import ElementTree

from compressllm.report.compare import Comparison, Line


def to_junit(comparison: Comparison) -> str:
    """One test case for each contender but the first."""
    held = comparison.lines[1:]
    suite = ElementTree.Element(
        "testsuite",
        name="compressllm compare",
        tests=str(len(held)),
        failures=str(len(comparison.failed)),
        errors="0",
        skipped="0",
    )
    for line in held:
        case = ElementTree.SubElement(suite, "testcase", classname="compressllm.perplexity", name=line.name, time="0")
        if line.verdict == "failed":
            ElementTree.SubElement(case, "failure", message=sentence(comparison, line)).text = comparison.protocol
        else:
            ElementTree.SubElement(case, "system-out").text = sentence(comparison, line)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def github_lines(comparison: Comparison) -> list[str]:
    """Lines that a GitHub workflow shows beside its run: errors, and what is over the limit but within noise."""
    marked = {"failed": "error", "within noise": "warning"}
    lines = [
        f"::{marked[line.verdict]} title=perplexity {line.verdict}::{_escaped(sentence(comparison, line))}"
        for line in comparison.lines[1:]
        if line.verdict in marked
    ]
    return lines + [f"::warning title=compressllm compare::{_escaped(warning)}" for warning in comparison.warnings]


def sentence(comparison: Comparison, line: Line) -> str:
    """What the gate says of one contender."""
    first = comparison.lines[0]
    words = f"{line.name}: perplexity {line.perplexity:.4f} against {first.perplexity:.4f} of {first.name}"
    if line.rise:
        words += f", {line.rise.value:+.2%}"
        if line.paired:
            words += f" (at {comparison.confidence:.0%} between {line.rise.low:+.2%} and {line.rise.high:+.2%})"
    if comparison.allowed is not None:
        words += f", where {comparison.allowed:.2%} is allowed: {line.verdict}"
    return words


def _escaped(words: str) -> str:
    return words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
