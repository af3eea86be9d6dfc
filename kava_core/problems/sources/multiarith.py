"""MultiArith: `sQuestion`, `lEquations` and `lSolutions`; or, on the Hub, two fields only.

There the problems are `question` and `final_ans`, without an equation: they can only be asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, checked_number
from kava_core.problems.sources.svamp import equation

_UNKNOWN = re.compile(r"^\s*[xX]\s*=")


@dataclass(frozen=True)
class MultiArith(RowSource):
    """The equation "X=((8.0+4.0)*3.0)" is the only step."""

    name = "multiarith"
    forms = ("equations",)
    layouts = (("sQuestion", "lEquations", "lSolutions"), ("question", "final_ans"))

    def read(self, row: Row, traces: TraceForm) -> Draft:
        if row.either("sQuestion", "question") == "question":
            answer = checked_number(row.number_text("final_ans"))
            return Draft(row.text("question"), (), answer, "word problem")
        answer = checked_number(row.only("lSolutions").number_text("lSolutions"))
        stated = row.only("lEquations")
        written = _UNKNOWN.sub("", stated.text("lEquations"))
        step = equation(stated, "lEquations", written, answer)
        return Draft(row.text("sQuestion"), (step,), answer, "word problem")
