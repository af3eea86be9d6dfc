"""MATH and its like: `problem`, and a `solution` in sentences with the answer in `\\boxed{…}`."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.answers import last_box
from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, UnusableRow, sentences


@dataclass(frozen=True)
class Boxed(RowSource):
    """The answer is the content of the last box, which may hold braces of its own."""

    name = "math"
    forms = ("sentences",)
    layouts = (("problem", "solution"),)

    def read(self, row: Row, traces: TraceForm) -> Draft:
        solution = row.text("solution")
        answer = last_box(solution)
        if not answer:
            raise UnusableRow("no answer in a \\boxed{…}")
        topic = next((row.text(name) for name in ("type", "subject") if name in row.fields), "")
        return Draft(row.text("problem"), sentences(solution), answer, topic or "mathematics")
