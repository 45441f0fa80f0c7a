"""Texts that recovery.py trains on and is evaluated on, made from collections of documents.

    python benchmarks/recovery_texts.py COLLECTIONS WIKITEXT OUT

COLLECTIONS is a folder of JSON lines with a `text` each: books_*, openwebtext_*, openstax_* and others. WIKITEXT is the
training part of WikiText-2, as JSON lines with a `text`; where it is the form with `<unk>` in it, lines with one are
left out. Written: OUT/wikitext.jsonl.gz and OUT/other.jsonl.gz to train on, and OUT/eval_{books,web,textbooks}.jsonl.gz
to evaluate on. Of the books whole ones are held back, of the rest every tenth document.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HELD_BOOKS = {"The Time Machine", "Right Ho, Jeeves"}
KINDS = {"books": "books_", "web": "openwebtext_", "textbooks": "openstax_"}  # name -> how its file's name begins
SHORTEST = 200  # characters of a document that is worth a place


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Documents of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def without_unknown(documents: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Documents less the lines with a word that was struck out."""
    for document in documents:
        kept = "\n".join(line for line in document["text"].split("\n") if "<unk>" not in line)
        if len(kept) >= SHORTEST:
            yield kept


def write(path: Path, texts: Iterable[str]) -> None:
    """As JSON lines; the same texts give the same bytes."""
    count = 0
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for count, text in enumerate(texts, 1):  # noqa: B007
            file.write(json.dumps({"text": text}).encode() + b"\n")
    print(f"{path.name}: {count} documents")


def main() -> None:
    """Make the five files."""
    collections, wikitext, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    held: dict[str, list[str]] = {kind: [] for kind in KINDS}
    other: list[str] = []
    for path in sorted(collections.glob("*.jsonl.gz")):
        kind = next((kind for kind, start in KINDS.items() if path.name.startswith(start)), None)
        for number, row in enumerate(rows(path)):
            if kind is not None and (row["title"] in HELD_BOOKS if kind == "books" else number % 10 == 0):
                held[kind].append(row["text"])
            elif len(row["text"]) >= SHORTEST and not row.get("truncated"):
                other.append(row["text"])
    write(out / "wikitext.jsonl.gz", without_unknown(rows(wikitext)))
    write(out / "other.jsonl.gz", other)
    for kind, texts in held.items():
        write(out / f"eval_{kind}.jsonl.gz", texts)


if __name__ == "__main__":
    main()
