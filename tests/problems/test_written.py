"""What is read in a chain of thought that a model wrote, and what is not kept of it."""

from __future__ import annotations

import pytest

from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.written import Chain, read_chain

PROBLEM = Problem("p", "how many ?", ("<<1+1=2>>",), "12", "toy", "")


def read(text: str, traces: TraceForm = "equations", ended: bool = True) -> Chain:
    return read_chain(text, PROBLEM, traces, answer_prompt="The answer is:", ended=ended)


@pytest.mark.parametrize(
    ("traces", "before", "steps"),
    [
        ("equations", "<<3+4=7>><<7+5=12>>", ("<<3+4=7>>", "<<7+5=12>>")),
        ("equations", "<<3 + 4 = 7>>\n<<7+5=12>>", ("<<3+4=7>>", "<<7+5=12>>")),
        ("sentences", "Ann has 7.\n\nWith 5 more, 12.", ("Ann has 7.", "With 5 more, 12.")),
        ("results", " 7 12", ("7", "12")),
        ("checked", " 7: 3+4 = 7 12: 7+5 = 12", ("7: 3+4 = 7", "12: 7+5 = 12")),
    ],
)
def test_steps_of_every_form(traces: TraceForm, before: str, steps: tuple[str, ...]) -> None:
    assert read(f"{before}The answer is: 12.0", traces) == Chain("kept", steps)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("<<3+4=7>>The answer is: 7", "wrong answer"),
        ("<<7+5=12>>", "no answer"),
        ("<<7+5=12>>12", "no answer"),
        ("<<7+5=12>>The answer is: ", "no answer"),
        ("The answer is: 12", "other form"),
        ("So <<7+5=12>>The answer is: 12", "other form"),
        ("He has 12.The answer is: 12", "other form"),
    ],
)
def test_what_is_not_kept(text: str, outcome: str) -> None:
    assert read(text) == Chain(outcome)  # type: ignore[arg-type]


def test_what_has_no_end_is_not_kept_whatever_it_says() -> None:
    assert read("<<7+5=12>>The answer is: 12", ended=False) == Chain("no end")


def test_the_answer_stands_behind_the_last_answer_prompt() -> None:
    chain = read("The answer is: 7\nNo.\nThe answer is: 12", "sentences")
    assert chain == Chain("kept", ("The answer is: 7", "No."))
