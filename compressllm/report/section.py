"""What a report is made of, before it is written as one kind of text or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Words in rows.

    Args:
        caption: What it shows.
        header: One word a column.
        rows: As long as the header.
        folded: Long: shown when it is asked for.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


class Picture(NamedTuple):
    """An SVG picture.

    Args:
        svg: The whole element.
        wide: Made for a wide page; scrolled to the side on a narrow one.
    """

    svg: str
    wide: bool = False


class Section(NamedTuple):
    """One part of a report; what its pictures show is in its tables too.

    Args:
        words: Paragraphs.
        cards: Headline facts: what, and how much.
        code: Shown as it is.
    """

    title: str
    words: Sequence[str] = ()
    cards: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    code: str = ""
