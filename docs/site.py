"""A hook of MkDocs: pages of the repository's root become pages of the site.

The site has no sources: a link to anything else in the repository becomes its words.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\[([^\]]+)\]\(([^):#\s]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r'((?:src|srcset)=")docs/')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root to those of docs/."""
    for path, page in PAGES.items():
        text = IMAGE.sub(r"\1", path.read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of a page as they are in the site."""
    del config, files
    folder = ROOT if page.file.src_uri in PAGES.values() else DOCS
    return LINK.sub(partial(_moved, folder=folder), markdown)


def _moved(link: re.Match[str], folder: Path) -> str:
    words, target, anchor = link.groups(default="")
    path = (folder / target).resolve()
    if not path.exists():
        return link[0]  # MkDocs says so
    if path.is_relative_to(DOCS):
        return f"[{words}]({path.relative_to(DOCS).as_posix()}{anchor})"
    return f"[{words}]({PAGES[path]}{anchor})" if path in PAGES else words
