"""GSM-Hard: GSM8K's test problems with large numbers: `input`, `code`, `target` (a float).

There is no chain of thought: `code` is a Python function, which is neither run nor read. The
problems have no steps, and can only be asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.base import Draft, RowSource, UnusableRow


@dataclass(frozen=True)
class GSMHard(RowSource):
    """A whole target is written without its ".0", any other with all digits of the float."""

    name = "gsm-hard"
    forms = ()
    layouts = (("input", "target"),)

    def read(self, row: Row, traces: TraceForm) -> Draft:
        answer = row.number_text("target")
        if not answer:
            raise UnusableRow("no answer")
        return Draft(row.text("input"), (), answer, "word problem")
