"""What a source is: a frozen dataclass whose fields are its settings.

Most are read: a `RowSource` says how one row of theirs becomes a problem. A `GeneratedSource` draws
its problems itself.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.splits import ProblemSplits

NOTE = re.compile(r"<<([^<>\n]*=[^<>\n]*)>>")
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"
_INITIAL = r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\bvs\.)(?<!\b[A-Z]\.)"
_SENTENCE_END = re.compile(rf"(?<=[.!?]){_INITIAL}\s+(?=[\"“$\\(]?[A-Z0-9\\$])|\n")


class UnusableRow(Exception):
    """A well-formed row that cannot be used; its text is the reason under which it is counted."""


@dataclass(frozen=True)
class Draft:
    """A row that was understood: question, steps (perhaps none), bare answer, topic."""

    question: str
    steps: tuple[str, ...]
    answer: str
    topic: str


class Source(ABC):
    """One format. `name` is what settings call it, `forms` the kinds of traces that it has.

    A source of equations has what is made `FROM_EQUATIONS` too.
    """

    name: ClassVar[str]
    forms: ClassVar[tuple[TraceForm, ...]]

    def gives(self, traces: TraceForm) -> bool:
        """Whether its steps can be had in this form."""
        return traces in self.forms or (traces in FROM_EQUATIONS and "equations" in self.forms)


class RowSource(Source):
    """A published format, row by row.

    `forms` is empty for one that has only questions and answers. `hub_config` is the configuration
    to ask the Hub for.
    """

    hub_config: ClassVar[str | None] = None

    @abstractmethod
    def read(self, row: Row, traces: TraceForm) -> Draft:
        """The row with its steps in the form `traces`, one of `forms`.

        KavaError, with the row's place, if it is malformed; UnusableRow if it is well-formed but
        has no answer that can be checked.
        """


class GeneratedSource(Source):
    """Problems without end, drawn by a seed."""

    @abstractmethod
    def splits(
        self, train: int, validation: int, test: int, *, seed: int, traces: TraceForm = "equations"
    ) -> ProblemSplits:
        """Draw the three splits; equal arguments give equal problems on every machine.

        No question stands twice. KavaError if there are not that many different problems.
        """


def notes(text: str) -> tuple[str, ...]:
    """The calculator notes of a text without spaces: ("<<48/2=24>>", …)."""
    return tuple(f"<<{''.join(note.split())}>>" for note in NOTE.findall(text))


def result(equation: str) -> str:
    """The right side of `<<a=b>>` or of a bare equation; UnusableRow if it has none."""
    stated = equation.removesuffix(">>").rpartition("=")[2].strip()
    if "=" not in equation or not stated:
        raise UnusableRow("a step without a result")
    return stated


def checked(equation: str) -> str:
    """`7: 3+4 = 7` of `<<3+4=7>>`: the result, then the working that ends in it; UnusableRow if the
    equation has none."""
    stated = result(equation)
    working = equation.removeprefix("<<").rpartition("=")[0].strip()
    return f"{stated}: {working} = {stated}"


# The forms of traces that any source of equations gives, made of an equation.
FROM_EQUATIONS: dict[TraceForm, Callable[[str], str]] = {"results": result, "checked": checked}


def equations_as(equations: Sequence[str], traces: TraceForm) -> list[str]:
    """Equations in the form `traces`, `equations` or one that is made of them."""
    written = FROM_EQUATIONS.get(traces)
    return [written(equation) for equation in equations] if written else list(equations)


def lines(text: str) -> tuple[str, ...]:
    """The lines of a text without its notes."""
    found = (" ".join(line.split()) for line in NOTE.sub("", text).splitlines())
    return tuple(line for line in found if line)


def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text without its notes; a line end also ends a sentence."""
    found = (" ".join(part.split()) for part in _SENTENCE_END.split(NOTE.sub("", text)))
    return tuple(part for part in found if part)


def marked(text: str) -> tuple[str, str, str]:
    """A text cut at its last `####`: what is before it, the mark or "", and what follows."""
    body, mark, rest = text.rpartition(_MARK)
    return body, mark, rest.strip()


def number(text: str) -> str | None:
    """A number without its commas, or None if the text is anything else."""
    return text.replace(",", "") if NUMBER.fullmatch(text) else None


def checked_number(text: str) -> str:
    """A number, perhaps behind `####`; UnusableRow if there is none."""
    answer = marked(text)[2]
    if not answer:
        raise UnusableRow("no answer")
    found = number(answer)
    if found is None:
        raise UnusableRow("answer is no number")
    return found
