"""What is read from a text as its answer, and when it is right."""

from __future__ import annotations

import pytest

from kava_core.problems.judge import Verdict, judge, read_answer


@pytest.mark.parametrize(
    ("text", "prompted", "chained"),
    [
        (" 72", "72", "72"),
        (" x^2 + 1", "x^2 + 1", "1"),
        (" 3 of 5\n7", "3 of 5", "7"),
        (" yes", "yes", ""),
        ("", "", ""),
        ("<<3+4=7>>The answer is: x^2", "x^2", "x^2"),
    ],
)
def test_a_prompted_answer_is_the_line_behind_the_prompt(
    text: str, prompted: str, chained: str
) -> None:
    """As where a system wrote the prompt itself: of an expression not only the last number."""
    assert read_answer(text, prompted=True) == prompted
    assert read_answer(text, prompted=False) == chained


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        (" 72", "72.0", Verdict("72", True)),
        (" 72", "27", Verdict("72", False)),
        ("", "", Verdict("", False)),
    ],
)
def test_an_answer_is_right_if_there_is_one_and_it_is_the_gold_one(
    text: str, gold: str, verdict: Verdict
) -> None:
    assert judge(text, gold, prompted=True) == verdict
