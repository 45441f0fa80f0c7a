"""Real English that every CPython carries: the language reference that ``help()`` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compressllm.core.errors import CalibrationError
from compressllm.core.protocols import SOURCES, Split

# pydoc repeats whole sections of long topics as topics of their own. A paragraph of this many characters is
# the same text wherever it stands; shorter ones ("See also:", "New in version 3.10.") recur by chance.
_TELLING = 80


@SOURCES.register("builtin")
@dataclass(frozen=True)
class Builtin:
    """Python's language reference (pydoc_data.topics), in two disjoint parts; needs no network and no file.

    About 46k tokens a part on Python 3.11. The text differs between Python versions, so compare numbers
    only where the text's hash is equal.
    """

    def texts(self, split: Split) -> Iterator[str]:
        """The topics of one part in their stored order. Raises CalibrationError if this Python has none."""
        topics = _topics()
        chosen = split_topics(topics)[split]
        return (text.strip() for name, text in topics.items() if name in chosen)


def split_topics(topics: Mapping[str, str]) -> dict[Split, set[str]]:
    """Deal topics into two parts of near equal length that share no paragraph.

    Longest first, each to the part it shares a paragraph with, or else to the shorter part. A topic that only
    repeats longer ones, or repeats some of both parts, is left out.
    """
    names: dict[Split, set[str]] = {"evaluation": set(), "calibration": set()}
    seen: dict[Split, set[str]] = {"evaluation": set(), "calibration": set()}
    length: dict[Split, int] = {"evaluation": 0, "calibration": 0}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        own = _paragraphs(topics[name])
        homes = [part for part in names if own & seen[part]]
        if len(homes) > 1 or (own and any(own <= seen[part] for part in homes)):
            continue
        part = homes[0] if homes else min(length, key=lambda part: length[part])
        names[part].add(name)
        seen[part] |= own
        length[part] += len(topics[name])
    return names


def _paragraphs(text: str) -> set[str]:
    stripped = (paragraph.strip() for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in stripped if len(paragraph) >= _TELLING}


def _topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions cut it out of their smallest Python
        raise CalibrationError(
            "builtin: this Python comes without pydoc_data.topics; install the full standard library, "
            "or give a path to a text file"
        ) from None
    return topics
