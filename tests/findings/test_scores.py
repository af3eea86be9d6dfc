"""Shares of right answers, their intervals, and their order."""

from __future__ import annotations

import pytest

from kava_core.findings.scores import CommonestAnswer, GroupScore, score_steps, wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
        # symmetric, and z² / (n + z²) where nothing was right
        (50, 100, 40.38, 59.62),
        (0, 10, 0.0, 100 * 3.841459 / 13.841459),
        (10, 10, 100 * 10 / 13.841459, 100.0),
    ],
)
def test_wilson_against_published_intervals(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-3)


@pytest.mark.parametrize("n", [1, 3, 500])
def test_wilson_holds_the_proportion_and_stays_within_0_and_100(n: int) -> None:
    for correct in range(n + 1):
        low, high = wilson(correct, n)
        proportion = 100 * correct / n
        assert 0 <= low <= proportion + 1e-9 and proportion - 1e-9 <= high <= 100


def test_steps_are_scored_apart_and_stand_by_number_not_by_letter() -> None:
    found = score_steps([10, 2, 2, 2], [True, True, False, True])
    assert found == {
        2: GroupScore(exact_match=200 / 3, n=3),
        10: GroupScore(exact_match=100.0, n=1),
    }
    assert list(found) == [2, 10]


def test_the_commonest_answer_is_what_is_said_most_often() -> None:
    found = CommonestAnswer.of(["7", "", "7", "3"], ["7", "3", "3", "1"])
    assert found == CommonestAnswer(answer="7", share=50.0, gold=50.0)
    assert CommonestAnswer.of(["", ""], ["7", "3"]) is None
    first = CommonestAnswer.of(["3", "7"], ["7", "3"])
    assert first is not None and first.answer == "3"


@pytest.mark.parametrize(
    ("share", "gold", "collapsed"),
    [(99.8, 11.2, True), (50.0, 30.0, True), (49.9, 10.0, False), (60.0, 40.1, False)],
)
def test_one_answer_to_most_problems_is_a_collapse_unless_it_is_mostly_right(
    share: float, gold: float, collapsed: bool
) -> None:
    assert CommonestAnswer(answer="7", share=share, gold=gold).collapsed == collapsed
