"""Any table with a question and an answer, by the names of its columns."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.problems.files import Row
from kava_core.problems.records import TraceForm
from kava_core.problems.sources.base import Draft, Source, UnusableRow


@dataclass(frozen=True)
class Table(Source):
    """Columns by name; `steps` is a list of texts, or one text that `separator` cuts.

    Without a column of steps the problems can only be asked.
    """

    question: str
    answer: str
    steps: str | None = None
    topic: str | None = None
    separator: str = "\n"

    name = "table"
    forms = ("equations", "sentences")

    def read(self, row: Row, traces: TraceForm) -> Draft:
        answer = row.number_text(self.answer)
        if not answer:
            raise UnusableRow("no answer")
        found: list[str] | str = row.texts(self.steps) if self.steps else []
        parts = found.split(self.separator) if isinstance(found, str) else found
        steps = (" ".join(part.split()) for part in parts)
        topic = row.text(self.topic) if self.topic else "any"
        return Draft(row.text(self.question), tuple(filter(None, steps)), answer, topic)
