"""A report as Markdown: all its words and tables, without the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from compressllm.report.section import Section, Table


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """One Markdown text."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_plain(words) for words in section.words]
        if section.cards:
            parts.append("\n".join(f"- {_plain(what)}: **{_plain(much)}**" for what, much in section.cards))
        parts += [table_text(table) for table in section.tables]
        if section.code:
            fence = "`" * max(3, 1 + max(map(len, section.code.split("\n"))) * ("```" in section.code))
            parts.append(f"{fence}\n{section.code.rstrip()}\n{fence}")
    return "\n\n".join(parts) + "\n"


def table_text(table: Table) -> str:
    """A table of pipes under its caption."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(_cell(word) for word in row) + " |" for row in lines)
    return f"{_plain(table.caption)}:\n\n{body}" if table.caption else body


def _cell(word: str) -> str:
    return _plain(word).replace("|", "\\|").replace("\n", " ")


def _plain(words: str) -> str:
    """Without what Markdown would take for HTML."""
    return words.replace("&", "&amp;").replace("<", "&lt;")
