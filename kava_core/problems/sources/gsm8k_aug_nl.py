"""GSM8k-Aug-NL: the problems of GSM8k-Aug with sentences: `question`, `cot`, `answer`."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, checked_number, sentences


@dataclass(frozen=True)
class GSM8kAugNL(RowSource):
    """`cot` is cut into sentences; `answer` is a number, perhaps behind `####`."""

    name = "gsm8k-aug-nl"
    forms = ("sentences",)

    def read(self, row: Row, traces: TraceForm) -> Draft:
        cot = row.texts("cot")
        answer = checked_number(row.number_text("answer"))
        steps = sentences(cot if isinstance(cot, str) else "\n".join(cot))
        return Draft(row.text("question"), steps, answer, "word problem")
