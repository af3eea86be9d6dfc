"""Chat logs: a user's question, and an assistant's reasoning, line by line, with the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kava_core.errors import KavaError
from kava_core.problems.records import TraceForm
from kava_core.problems.rows import BadRow, Row
from kava_core.problems.sources import RowSource
from kava_core.problems.sources.base import Draft, UnusableRow


@dataclass(frozen=True)
class ChatLog(RowSource):
    """Rows with `messages`, of which the first user's is the question and the next the reasoning.

    mark: what stands before the answer in the last line of the reasoning.
    """

    name = "chat-log"
    forms = ("equations", "sentences")
    layouts = (("messages",),)

    mark: str = "####"

    def __post_init__(self) -> None:
        if not self.mark.strip():
            raise KavaError(f"expected a text as `mark`, found {self.mark!r}.")

    def read(self, row: Row, traces: TraceForm) -> Draft:
        said: Any = row.fields.get("messages")
        try:
            texts = {message["role"]: message["content"] for message in reversed(said)}
            question, reasoning = texts["user"], texts["assistant"]
            *steps, last = [line.strip() for line in reasoning.splitlines() if line.strip()]
        except (TypeError, KeyError, AttributeError, ValueError):
            raise BadRow(
                row.place, "messages of a user and an assistant", f"{said!r:.80}"
            ) from None
        if not last.startswith(self.mark):
            raise UnusableRow(f"no last line with {self.mark}")
        return Draft(question, tuple(steps), last.removeprefix(self.mark).strip(), "chat")
