"""Any table with a question and an answer, by the names of its columns."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.errors import KavaError
from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, UnusableRow


@dataclass(frozen=True)
class Table(RowSource):
    """Columns by name. Without one of steps the problems can only be asked.

    question, answer, topic: the columns of texts. steps: the column of a list of texts, or of one
    text that `separator` cuts. separator: what stands between steps.
    """

    name = "table"
    forms = ("equations", "sentences")

    question: str
    answer: str
    steps: str | None = None
    topic: str | None = None
    separator: str = "\n"

    def __post_init__(self) -> None:
        columns = {
            "question": self.question,
            "answer": self.answer,
            "steps": self.steps,
            "topic": self.topic,
        }
        for setting, column in columns.items():
            if column is not None and not column.strip():
                raise KavaError(
                    f"Expected `{setting}` to name a column, found {column!r}. Correct the setting."
                )
        if not self.separator:
            raise KavaError("Expected a text as `separator`, found ''. Correct the setting.")
        if self.steps is None and self.separator != Table.separator:
            raise KavaError(
                f"Expected `separator` only beside a column of `steps`, which it cuts, found "
                f"{self.separator!r}. Name the column, or leave `separator` out."
            )

    def read(self, row: Row, traces: TraceForm) -> Draft:
        answer = row.number_text(self.answer)
        if not answer:
            raise UnusableRow("no answer")
        found: list[str] | str = row.texts(self.steps) if self.steps else []
        parts = found.split(self.separator) if isinstance(found, str) else found
        steps = (" ".join(part.split()) for part in parts)
        topic = row.text(self.topic) if self.topic else "any"
        return Draft(row.text(self.question), tuple(filter(None, steps)), answer, topic)
