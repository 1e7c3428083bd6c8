"""Lets mkdocs show pages that live outside docs/ (README.md and others), and fits links to the site.

mkdocs.yml lists those pages under ``extra.pages``. In the repository, links are relative to the file they are in; here
each becomes a link to the page of that file. A link to a file without a page (a script) becomes its name.
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/."""
    for page, path in config.extra["pages"].items():
        with open(os.path.join(os.path.dirname(config.config_file_path), path), encoding="utf-8") as file:
            files.append(File.generated(config, page, content=file.read()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    pages = {path: name for name, path in config.extra["pages"].items()}
    sources = {name: path for path, name in pages.items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")
    return _outside_code(markdown, lambda text: _LINK.sub(lambda link: _rewritten(link, source, here, pages), text))


def _rewritten(link: re.Match[str], source: str, here: str, pages: dict[str, str]) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    if "://" in target or not target:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    page = pages.get(path) or pages.get(f"{path}/README.md")
    if page is None and path.startswith("docs/") and path.endswith(".md"):
        page = path.removeprefix("docs/")
    if page is None:
        return text
    return f"[{text}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{anchor})"


def _outside_code(markdown: str, change: Any) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)
