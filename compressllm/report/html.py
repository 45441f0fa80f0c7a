"""A report as one HTML file that needs nothing else: no script, no font, no address."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from compressllm.report.section import Picture, Section, Table
from compressllm.stages.svg import STYLE

_PAGE: Final = """
  :root { color-scheme: light dark; --ink: #1f2328; --faint: #d0d7de; --page: #ffffff; --line: #0969da;
          --quiet: #59636e; --card: #f6f8fa; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6edf3; --faint: #3d444d; --page: #0d1117; --line: #58a6ff; --quiet: #9198a1; --card: #161b22; }
  }
  * { box-sizing: border-box; }
  body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--page); color: var(--ink);
         font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
  h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
  h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; border-bottom: 1px solid var(--faint); padding-bottom: .25rem; }
  a { color: var(--line); }
  nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
  :focus-visible { outline: 3px solid var(--line); outline-offset: 2px; }
  .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1rem 0; }
  .cards div { background: var(--card); border: 1px solid var(--faint); border-radius: .5rem; padding: .6rem .8rem; }
  .cards dt { color: var(--quiet); font-size: .875rem; }
  .cards dd { margin: 0; font-size: 1.125rem; font-weight: 600; font-variant-numeric: tabular-nums; }
  .pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem;
              align-items: start; }
  .pictures svg { display: block; width: 100%; max-width: 27rem; height: auto; }
  .wide { grid-column: 1 / -1; overflow-x: auto; }
  .wide svg { min-width: 35rem; max-width: 48rem; }
  .scroll { overflow-x: auto; max-height: 32rem; overflow-y: auto; margin: .75rem 0; }
  table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
  caption { text-align: left; color: var(--quiet); padding: .25rem 0; }
  th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--faint);
           white-space: nowrap; }
  summary { cursor: pointer; padding: .4rem 0; color: var(--line); }
  pre { background: var(--card); border: 1px solid var(--faint); border-radius: .5rem; padding: .75rem;
        overflow-x: auto; font-size: .8125rem; }
  @media print { details > * { display: block; } .scroll { max-height: none; } }
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One HTML text; reads on a phone and on a desk, on light and on dark, and is walked through by keyboard."""
    links = "".join(f'<li><a href="#{_anchor(section)}">{escape(section.title)}</a></li>' for section in sections)
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{_PAGE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    anchor = _anchor(section)
    parts = [f'<section aria-labelledby="{anchor}">', f'<h2 id="{anchor}">{escape(section.title)}</h2>']
    parts += [f"<p>{escape(words)}</p>" for words in section.words]
    if section.cards:
        cards = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(much)}</dd></div>" for what, much in section.cards)
        parts.append(f'<dl class="cards">{cards}</dl>')
    if section.pictures:
        parts.append(f'<div class="pictures">{"".join(_picture(picture) for picture in section.pictures)}</div>')
    parts += [_table(table) for table in section.tables]
    if section.code:
        parts.append(f'<pre tabindex="0"><code>{escape(section.code.rstrip())}</code></pre>')
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    # What scrolls takes the keyboard's focus, or it could be scrolled by pointer only.
    attributes = ' class="wide" tabindex="0"' if picture.wide else ""
    return f'<figure{attributes} style="margin:0">{picture.svg}</figure>\n'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption and not table.folded else ""
    label = escape(table.caption or "table")
    whole = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )
    return f"<details><summary>{label}</summary>{whole}</details>" if table.folded else whole


def _anchor(section: Section) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in section.title.lower())
