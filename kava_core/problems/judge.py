"""Whether what a system wrote is the answer to a problem."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.answers import extract_answer, same_answer
from kava_core.problems.prompt import ANSWER_PROMPT


@dataclass(frozen=True)
class Verdict:
    """answer: what was read from a text, "" if nothing could be; correct: it is the gold one."""

    answer: str
    correct: bool


def read_answer(text: str, *, prompted: bool, answer_prompt: str = ANSWER_PROMPT) -> str:
    """The answer in a generated text, "" if there is none.

    prompted: the text was written behind the answer prompt. It is then read as if the system had
    written the prompt, so that all systems are read alike. An answer prompt of one's own is read as
    the common one, the last of them.
    """
    written = answer_prompt + text if prompted else text
    before, there, behind = written.rpartition(answer_prompt)
    return extract_answer(f"{before}{ANSWER_PROMPT if there else ''}{behind}") or ""


def judge(text: str, gold: str, *, prompted: bool, answer_prompt: str = ANSWER_PROMPT) -> Verdict:
    """Read the answer in a text and compare it with the gold one."""
    answer = read_answer(text, prompted=prompted, answer_prompt=answer_prompt)
    return Verdict(answer, bool(answer) and same_answer(answer, gold))
