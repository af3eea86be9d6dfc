"""The table of docs/reliability.md, from docs/reliability.json: `make faults` writes both.

`python docs/reliability.py RESULTS` sums up what the tests of tests/faults noted (a JSON line for
each fault that was injected) in docs/reliability.json; the table follows from that file alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).parent
PAGE, SUMMARY = DOCS / "reliability.md", DOCS / "reliability.json"
BEGIN, END = "<!-- the table: written by `make faults` -->\n", "<!-- the end of the table -->\n"
COLUMNS = ("fault", "how", "outcome")


def summarise(results: str) -> list[dict[str, str | int]]:
    """Rows of the table from JSON lines: equal faults, injected and ended alike, are one row."""
    found = [json.loads(line) for line in results.splitlines()]
    counts = Counter(tuple(str(entry[column]) for column in COLUMNS) for entry in found)
    return [
        {**dict(zip(COLUMNS, key, strict=True)), "times": times}
        for key, times in sorted(counts.items())
    ]


def table(rows: list[dict[str, str | int]]) -> str:
    """The rows in Markdown."""
    lines = ["| fault | how it was injected | how often | outcome |", "|---|---|---|---|"]
    for row in rows:
        cells = (row["fault"], row["how"], row["times"], row["outcome"])
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def page(text: str, rows: list[dict[str, str | int]]) -> str:
    """The page with this table in the place of its own."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(rows) + END + rest.partition(END)[2]


def main(results: Path) -> None:
    """Write the summary of `results` and the page's table."""
    rows = summarise(results.read_text(encoding="utf-8"))
    SUMMARY.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
