"""Pages link to files beside the docs folder, as they do on a code host; here these files become part of the site."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parents[2]
_OUTSIDE = (
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "LICENSE",
    "tests/*/README.md",
    "benchmarks/README.md",
    "benchmarks/results/*",
)
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages may link to."""
    for pattern in _OUTSIDE:
        for path in sorted(_ROOT.glob(pattern)):
            name = path.relative_to(_ROOT).as_posix()
            files.append(File(name, str(_ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between ``docs`` and its surroundings into links within the site; one to nowhere stays and fails."""
    uri = page.file.src_uri
    inside = Path(str(page.file.abs_src_path)).is_relative_to(config.docs_dir)
    here = posixpath.dirname(posixpath.join("docs", uri) if inside else uri)

    def moved(link: re.Match[str]) -> str:
        start, target, anchor, end = link.groups()
        if "://" in target or target.startswith(("/", "mailto:")):
            return link[0]
        place = posixpath.normpath(posixpath.join(here, target)).removeprefix("docs/")
        if files.get_file_from_path(place) is None:
            return link[0]
        return f"{start}{os.path.relpath(place, posixpath.dirname(uri) or '.')}{anchor or ''}{end}"

    return _LINK.sub(moved, markdown)
