"""The licences of what requirements.txt pins: `make licences` prints them.

Each package's own word, from its metadata: the licence expression, the licence field if it is
short, or the classifiers. Exit status 1 if one is unknown, or not in PERMISSIVE.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Words of licences that ask for notice at most; weak ones that ask for the source of their own
# files (MPL) too.
PERMISSIVE = re.compile(r"apache|\bmit\b|\bbsd\b|\bisc\b|\bpsf\b|python software|mpl|mozilla", re.I)
STRONG = re.compile(r"\b[al]?gpl|general public|sspl|non-?commercial|proprietary", re.I)


@dataclass(frozen=True)
class Entry:
    """A package that is pinned; licence: empty if it does not say."""

    name: str
    version: str
    licence: str


def pinned() -> list[str]:
    """`name==version` for each line of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [re.sub(r"\[.*?\]", "", line.strip()) for line in lines if "==" in line]


def licence_of(name: str) -> str:
    """What the installed package says of its licence, in a line."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return ""
    fields: dict[str, Any] = package.metadata.json
    said = str(fields.get("license_expression") or fields.get("license") or "")
    if said and "\n" not in said and len(said) < 60:
        return said
    marks = [
        line.rpartition(" :: ")[2]
        for line in fields.get("classifier", [])
        if line.startswith("License ::")
    ]
    return ", ".join(marks) or said.strip().partition("\n")[0] or _by_its_text(package)


def _by_its_text(package: Distribution) -> str:
    """Where the metadata say nothing: what the file of the licence is."""
    for file in package.files or []:
        if file.name.upper().startswith("LICENSE"):
            text = " ".join(Path(str(file.locate())).read_text(encoding="utf-8").split())
            if "Redistribution and use in source and binary forms" in text:
                return "BSD (by its text)"
    return ""


def found() -> list[Entry]:
    """Of every package that is pinned."""
    return [Entry(n, v, licence_of(n)) for n, _, v in (line.partition("==") for line in pinned())]


def wrong(entries: list[Entry]) -> list[Entry]:
    """Those whose licence is unknown or asks for more."""
    return [e for e in entries if STRONG.search(e.licence) or not PERMISSIVE.search(e.licence)]


if __name__ == "__main__":
    entries = found()
    for entry in entries:
        print(f"{entry.name:24} {entry.version:12} {entry.licence}")
    for entry in wrong(entries):
        print(f"{entry.name}: licence unknown, or not permissive: {entry.licence}", file=sys.stderr)
    sys.exit(1 if wrong(entries) else 0)
