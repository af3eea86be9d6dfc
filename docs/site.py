"""A hook of MkDocs: pages that stand in the root of the repository become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r'(\]\(|(?:src|srcset)=")([^):"#]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root to those of docs/."""
    for name, page in PAGES.items():
        text = LINK.sub(_moved, (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def _moved(link: re.Match[str]) -> str:
    before, target = link.groups()
    return before + PAGES.get(target, target.removeprefix("docs/"))
