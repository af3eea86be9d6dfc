"""MetaMathQA: `query`, a `response` that ends in `The answer is: …`, and its `type`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, UnusableRow, sentences

_ANSWER = re.compile(r"the answer is\s*:?", re.IGNORECASE)
_MARKED_LINE = re.compile(r"^\s*####.*$", re.MULTILINE)


@dataclass(frozen=True)
class MetaMath(RowSource):
    """The answer is the rest of the line behind the last "The answer is:", LaTeX as it is.

    Steps are the sentences before it, without the line `#### n` that GSM8K's offspring repeats.
    """

    name = "metamath"
    forms = ("sentences",)
    layouts = (("query", "response"),)

    def read(self, row: Row, traces: TraceForm) -> Draft:
        response = row.text("response")
        found = list(_ANSWER.finditer(response))
        rest = response[found[-1].end() :].strip() if found else ""
        if not rest:
            raise UnusableRow("no answer")
        body = _MARKED_LINE.sub("", response[: found[-1].start()])
        answer = " ".join(rest.splitlines()[0].split())
        topic = row.text("type") if "type" in row.fields else "mathematics"
        return Draft(row.text("query"), sentences(body), answer, topic)
