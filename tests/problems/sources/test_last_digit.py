"""Last-digit chains: nothing but the whole chain says where it ends."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from kava_core.errors import KavaError
from kava_core.problems.sources import SOURCES
from kava_core.problems.sources.last_digit import LastDigit

SPLITS = LastDigit().splits(2000, 50, 400, seed=3)


def replay(question: str) -> list[int]:
    """The states after each operation, read off the question alone."""
    value = int(re.match(r"counter at (\d)", question)[1])
    states = []
    for word, operand in re.findall(r"(plus|times) (\d)", question):
        value = (value + int(operand) if word == "plus" else value * int(operand)) % 10
        states.append(value)
    return states


def test_steps_and_answer_follow_from_the_question() -> None:
    for problem in SPLITS.train:
        states = replay(problem.question)
        assert [int(step.removesuffix(">>").partition("=")[2]) for step in problem.steps] == states
        assert problem.answer == str(states[-1]) and len(states) == 4


def test_results_are_the_states_alone() -> None:
    alone = LastDigit().splits(2000, 50, 400, seed=3, traces="results")
    for problem, whole in zip(alone.train, SPLITS.train, strict=True):
        assert problem.question == whole.question
        assert problem.steps == tuple(map(str, replay(problem.question)))


def test_checked_results_begin_and_end_a_step() -> None:
    checked = LastDigit().splits(2000, 50, 400, seed=3, traces="checked")
    for problem, whole in zip(checked.train, SPLITS.train, strict=True):
        assert problem.question == whole.question
        for step, state in zip(problem.steps, replay(problem.question), strict=True):
            assert re.fullmatch(rf"{state}: \d[+*]\d = {state}", step)


def test_no_operation_tells_the_answer() -> None:
    """Given any one operation, or the start, every answer stays about as likely as another."""
    given: dict[str, Counter[str]] = {}
    for problem in SPLITS.train:
        parts = re.findall(r"\w+ (?:at )?\d", problem.question)
        assert len(parts) == 5
        for part in parts:
            given.setdefault(part, Counter())[problem.answer] += 1
    for part, answers in given.items():
        total = sum(answers.values())
        assert total < 100 or max(answers.values()) / total < 0.25, (part, answers)


def test_no_question_is_asked_that_was_taught() -> None:
    taught = {p.question for p in (*SPLITS.train, *SPLITS.validation)}
    assert len(taught) == 2050 and not taught & {p.question for p in SPLITS.test}


def test_more_training_problems_leave_the_others_as_they_were() -> None:
    more = LastDigit().splits(3000, 50, 400, seed=3)
    assert more.test == SPLITS.test and more.validation == SPLITS.validation
    assert more.train[:2000] == SPLITS.train


def test_lengths_are_those_asked_for() -> None:
    splits = SOURCES["last-digit"](steps=(2, 6)).splits(600, 0, 0, seed=0)
    counts = Counter(len(problem.steps) for problem in splits.train)
    assert set(counts) == {2, 3, 4, 5, 6} and min(counts.values()) > 80


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (-1, 1)])
def test_impossible_lengths_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(KavaError, match="two ascending numbers from 1"):
        LastDigit(steps=steps)


def test_too_many_problems_are_refused() -> None:
    with pytest.raises(KavaError, match="Ask for fewer problems"):
        LastDigit(steps=(1, 1)).splits(500, 0, 0, seed=0)
