"""The tables of docs/reliability.md, from docs/reliability.json: `make faults` writes both.

`python docs/reliability.py RESULTS` sums up what the tests of tests/faults saw (a JSON line for
each test that passed) in docs/reliability.json; the tables follow from that file alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

DOCS = Path(__file__).parent
PAGE, SUMMARY = DOCS / "reliability.md", DOCS / "reliability.json"
BEGIN, END = "<!-- the tables: written by `make faults` -->\n", "<!-- the end of the tables -->\n"
FAULT, FIGURE = ("fault", "how", "outcome"), ("what", "figure", "promised")


class Summary(TypedDict):
    """faults: equal ones, injected and ended alike, with how many `times`. figures: what was
    measured, what it came to, and what is promised."""

    faults: list[dict[str, str | int]]
    figures: list[dict[str, str]]


def summarise(results: str) -> Summary:
    """From JSON lines, of which the last of each test counts."""
    entries = [json.loads(line) for line in results.splitlines()]
    last = {entry["test"]: entry["notes"] for entry in entries}
    notes = [note for notes in last.values() for note in notes]
    counts = Counter(tuple(note[x] for x in FAULT) for note in notes if "fault" in note)
    figures = sorted(tuple(note[x] for x in FIGURE) for note in notes if "what" in note)
    return {
        "faults": [
            {**dict(zip(FAULT, key, strict=True)), "times": times}
            for key, times in sorted(counts.items())
        ],
        "figures": [dict(zip(FIGURE, figure, strict=True)) for figure in figures],
    }


def tables(summary: Summary) -> str:
    """The summary in Markdown."""
    faults = [(x["fault"], x["how"], x["times"], x["outcome"]) for x in summary["faults"]]
    figures = [(x["what"], x["figure"], x["promised"]) for x in summary["figures"]]
    lines = _table(("fault", "how it was injected", "how often", "outcome"), faults)
    if figures:
        lines += ["", *_table(("what was measured", "here", "what is promised"), figures)]
    return "\n".join([*lines, ""])


def _table(head: tuple[str, ...], rows: Sequence[Sequence[str | int]]) -> list[str]:
    lines = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def page(text: str, summary: Summary) -> str:
    """The page with these tables in the place of its own."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + tables(summary) + END + rest.partition(END)[2]


def main(results: Path) -> None:
    """Write the summary of `results` and the page's tables."""
    summary = summarise(results.read_text(encoding="utf-8"))
    SUMMARY.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), summary), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
