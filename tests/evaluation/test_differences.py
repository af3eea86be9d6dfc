"""Every student's marks against those of every other system."""

from __future__ import annotations

from kava_core.evaluation.differences import compare
from tests.findings.test_paired import marks


def test_every_student_against_every_other_system() -> None:
    left, right = marks(30, 25, 10, 35)
    found = compare(
        {"teacher-cot": [True] * 100, "kava": left, "no-cot": right}, ["kava", "no-cot"]
    )
    assert {student: sorted(others) for student, others in found.items()} == {
        "kava": ["no-cot", "teacher-cot"],
        "no-cot": ["kava", "teacher-cot"],
    }
    one, other = found["kava"]["no-cot"], found["no-cot"]["kava"]
    assert one.difference == 15.0 and other.difference == -15.0
    assert one.ci95 == tuple(-bound for bound in reversed(other.ci95))
    assert one.p_value == other.p_value
