"""MATH and its like: `problem`, and a `solution` in sentences with the answer in `\\boxed{…}`."""

from __future__ import annotations

import re

from kava_core.problems.files import Row
from kava_core.problems.records import TraceForm
from kava_core.problems.sources.base import Draft, Source, UnusableRow, sentences

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?P<bare>[^\s{}$]+)")


class Boxed(Source):
    """The answer is the content of the last box, which may hold braces of its own."""

    name = "math"
    forms = ("sentences",)

    def read(self, row: Row, traces: TraceForm) -> Draft:
        solution = row.text("solution")
        answer = last_box(solution)
        if not answer:
            raise UnusableRow("no answer in a \\boxed{…}")
        topic = next((row.text(name) for name in ("type", "subject") if name in row.fields), "")
        return Draft(row.text("problem"), sentences(solution), answer, topic or "mathematics")


def last_box(text: str) -> str | None:
    """What is in the last `\\boxed{…}`, `\\fbox{…}` or `\\boxed 3`; None if it is not closed."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    if boxes[-1]["bare"]:
        return boxes[-1]["bare"].rstrip(".,")
    start = boxes[-1].end() + 1
    depth = 1
    escaped = False
    for place in range(start, len(text)):
        sign = text[place]
        depth += 0 if escaped else {"{": 1, "}": -1}.get(sign, 0)
        escaped = sign == "\\" and not escaped
        if depth == 0:
            return " ".join(text[start:place].split())
    return None
