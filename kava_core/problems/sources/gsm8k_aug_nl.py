"""GSM8k-Aug-NL: the problems of GSM8k-Aug with sentences: `question`, `steps` or `cot`, `answer`.

A list is taken item by item; a text is cut into its sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, checked_number, lines, sentences


@dataclass(frozen=True)
class GSM8kAugNL(RowSource):
    """`answer` is a number, perhaps behind `####`."""

    name = "gsm8k-aug-nl"
    forms = ("sentences",)
    layouts = (("question", "steps", "answer"), ("question", "cot", "answer"))

    def read(self, row: Row, traces: TraceForm) -> Draft:
        written = row.texts(row.either("steps", "cot"))
        answer = checked_number(row.number_text("answer"))
        steps = sentences(written) if isinstance(written, str) else _items(written)
        return Draft(row.text("question"), steps, answer, "word problem")


def _items(steps: list[str]) -> tuple[str, ...]:
    return tuple(filter(None, (" ".join(lines(step)) for step in steps)))
