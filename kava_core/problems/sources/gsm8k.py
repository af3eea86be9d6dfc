"""GSM8K: `question`, and an `answer` of sentences with `<<a=b>>` notes and a last line `#### n`."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import BadRow, Row
from kava_core.problems.sources.base import Draft, RowSource, lines, marked, notes, number


@dataclass(frozen=True)
class GSM8K(RowSource):
    """openai/gsm8k. Equations are the notes, sentences the lines without them."""

    name = "gsm8k"
    forms = ("equations", "sentences")
    hub_config = "main"
    layouts = (("question", "answer"),)

    def read(self, row: Row, traces: TraceForm) -> Draft:
        text = row.text("answer")
        body, mark, last = marked(text)
        answer = number(last)
        if not mark or answer is None:
            raise BadRow(row.place, "`answer` to end in a line '#### number'", repr(text[-60:]))
        steps = notes(body) if traces == "equations" else lines(body)
        return Draft(row.text("question"), steps, answer, "word problem")
