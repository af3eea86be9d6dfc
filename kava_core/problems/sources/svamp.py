"""SVAMP: `Body`, `Question`, `Equation` ("( 8.0 - 2.0 )"), `Answer` and `Type`.

The Hub's form has `question_concat` too, body and question with a space between, and its answers
are texts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, checked_number

_WHOLE = re.compile(r"(?<![\d.])(\d+)\.0+(?!\d)")
_EQUATION = re.compile(r"[-+*/().\d]+")


@dataclass(frozen=True)
class SVAMP(RowSource):
    """The question is body and question with a space between; the equation is the only step."""

    name = "svamp"
    forms = ("equations",)
    layouts = (("Body", "Question", "Equation", "Answer", "Type"),)

    def read(self, row: Row, traces: TraceForm) -> Draft:
        answer = checked_number(_whole(row.number_text("Answer")))
        step = equation(row, "Equation", row.text("Equation"), answer)
        question = f"{row.text('Body')} {row.text('Question')}"
        return Draft(question, (step,), answer, row.text("Type"))


def equation(row: Row, name: str, written: str, answer: str) -> str:
    """`<<8-2=6>>` of "( 8.0 - 2.0 )", which is written in field `name`; BadRow if it is none."""
    left = _outer(_whole("".join(written.split())))
    if not _EQUATION.fullmatch(left):
        raise row.wrong("an equation of numbers", name)
    return f"<<{left}={answer}>>"


def _whole(text: str) -> str:
    """Numbers without a useless ".0"."""
    return _WHOLE.sub(r"\1", text)


def _outer(equation: str) -> str:
    """An expression without brackets around all of it."""
    while equation.startswith("(") and equation.endswith(")"):
        depths = list(accumulate({"(": 1, ")": -1}.get(sign, 0) for sign in equation))
        if 0 in depths[:-1]:  # the first bracket is closed before the end
            break
        equation = equation[1:-1]
    return equation
