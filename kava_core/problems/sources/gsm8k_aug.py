"""GSM8k-Aug: GSM8K's training problems multiplied by a language model, with equations only.

Two forms are read: the text file, one problem a line, `question||<<a=b>> <<c=d>> #### n`, and rows
of `question`, `steps` or `cot` (a list, or one text) and `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import BadRow, Row
from kava_core.problems.sources.base import (
    NOTE,
    Draft,
    RowSource,
    UnusableRow,
    checked_number,
    marked,
    notes,
)


@dataclass(frozen=True)
class GSM8kAug(RowSource):
    """The equations are taken as they stand."""

    name = "gsm8k-aug"
    forms = ("equations",)
    layouts = (("question", "steps", "answer"), ("question", "cot", "answer"), ("text",))

    def read(self, row: Row, traces: TraceForm) -> Draft:
        if set(row.fields) == {"text"}:
            question, trace, answer = self._cut(row)
        else:
            question, answer = row.text("question"), row.number_text("answer")
            steps = row.texts(row.either("steps", "cot"))
            trace = steps if isinstance(steps, str) else " ".join(steps)
        if NOTE.sub("", trace).strip():
            raise UnusableRow("steps that are no <<equations>>")
        return Draft(question, notes(trace), checked_number(answer), "word problem")

    def _cut(self, row: Row) -> tuple[str, str, str]:
        question, bars, rest = row.text("text").partition("||")
        trace, mark, answer = marked(rest)
        if not bars or not mark or not question.strip():
            raise BadRow(
                row.place,
                "'question||<<a=b>> <<c=d>> #### number'",
                repr(row.fields["text"][-80:]),
                "Mend the line.",
            )
        return question, trace, answer
