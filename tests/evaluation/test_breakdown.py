"""What a trace is like is read from its text."""

from __future__ import annotations

import pytest

from kava_core.evaluation.breakdown import length_bin, operations, score_groups
from kava_core.findings.scores import GroupScore


@pytest.mark.parametrize(
    ("step", "signs"),
    [
        ("<<10-9=1>>", "−"),
        ("<<1+5*2=11>>", "+ ×"),
        ("<<48/2=24>>", "÷"),
        ("<<.5*4=2>>", "×"),
        ("<<20%*30=6>>", "×"),
        ("<<(3+4)*2=14>>", "+ ×"),
        ("Natalia sold 48/2 = 24 clips in May.", "÷"),
        ("16 eggs - 3 eggs = 13 eggs", "−"),
        ("$10 - $3 = $7", "−"),
        ("10 − 3", "−"),
        ("10 - -3 = 13", "−"),
        ("5 hours * 3 = 15", "×"),
        ("2 x 3 = 6", "×"),
        ("3 × 4 ÷ 2 = 6", "× ÷"),
        (r"3 \times 4 \div 2 - \frac{1}{2}", "− × ÷"),
        ("x - 1", "−"),
        ("half of 10 is 5", "none"),
        ("a twenty-five year old and a 10-year-old", "none"),
        ("-5 degrees at 60 km/h", "none"),
        ("She has 5 apples – he has 3.", "none"),
        ("a **bold** word", "none"),
        ("", "none"),
    ],
)
def test_operations_are_the_signs_between_operands(step: str, signs: str) -> None:
    assert operations([step]) == signs.split()


def test_operations_of_several_steps_are_counted_once_and_steps_do_not_run_together() -> None:
    assert operations(["<<4*2=8>>", "<<8+1=9>>", "<<9+1=10>>"]) == ["+", "×"]
    assert operations(["now 5", "-3 apples"]) == ["none"]
    assert operations([]) == ["none"]


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(0, "none"), (1, "1-8"), (8, "1-8"), (9, "9-16"), (27, "17-32"), (512, "257-512"),
     (513, "513+"), (9000, "513+")],
)  # fmt: skip
def test_bins_of_length(tokens: int, label: str) -> None:
    assert length_bin(tokens) == label


def test_a_problem_counts_under_each_of_its_labels() -> None:
    assert score_groups([["+"], ["+", "−"], ["none"]], [True, False, True]) == {
        "+": GroupScore(exact_match=50.0, n=2),
        "−": GroupScore(exact_match=0.0, n=1),
        "none": GroupScore(exact_match=100.0, n=1),
    }


@pytest.mark.parametrize(
    "ordered", [["+", "−", "×", "÷", "none"], ["1-8", "9-16", "17-32", "513+", "none"]]
)
def test_groups_stand_as_one_writes_them_and_by_number(ordered: list[str]) -> None:
    labels = [[label] for label in ordered[::-1]]
    assert list(score_groups(labels, [True] * len(labels))) == ordered
