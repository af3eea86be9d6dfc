"""A chain of thought that a model wrote, read as the steps and the answer of a problem."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kava_core.answers import same_answer
from kava_core.problems.judge import read_answer
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.sources.base import notes

# What becomes of a chain: `kept`, or why it is not.
Outcome = Literal[
    "kept", "repeated", "wrong answer", "other form", "unusable", "no answer", "no end"
]
# How the text of a chain falls into steps, in each form that a chain can have.
_STEPS: dict[TraceForm, Callable[[str], list[str]]] = {
    "equations": lambda text: list(notes(text)),
    "sentences": lambda text: [line.strip() for line in text.splitlines() if line.strip()],
    "results": str.split,
    "checked": lambda text: re.split(r"\s+(?=[^\s:]+: )", text.strip()),
}


@dataclass(frozen=True)
class Chain:
    """What a model wrote behind a question. steps: none unless the outcome is `kept`."""

    outcome: Outcome
    steps: tuple[str, ...] = ()


def read_chain(
    text: str, problem: Problem, traces: TraceForm, *, answer_prompt: str, ended: bool
) -> Chain:
    """The steps in a text, if it is a trace of `problem` in the form `traces` with its answer.

    ended: whether the text has the end that its model gave it. The steps are all that stands before
    the last answer prompt, white space aside: what is taught is what was written.
    """
    before, _, behind = text.rpartition(answer_prompt)
    if not ended:
        return Chain("no end")
    if answer_prompt not in text or not behind.strip():
        return Chain("no answer")
    answer = read_answer(text, prompted=False, answer_prompt=answer_prompt)
    if not answer or not same_answer(answer, problem.answer):
        return Chain("wrong answer" if answer else "no answer")
    steps = tuple(_STEPS[traces](before))
    if not _bare("".join(steps)) or _bare("".join(steps)) != _bare(before):
        return Chain("other form")
    return Chain("kept", steps)


def _bare(text: str) -> str:
    return "".join(text.split())
