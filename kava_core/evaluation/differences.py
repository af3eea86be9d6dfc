"""Whether one system answers more problems than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kava_core.findings.evaluation import Difference
from kava_core.findings.paired import paired_bootstrap


def compare(
    marks: Mapping[str, Sequence[bool]], students: Sequence[str]
) -> dict[str, dict[str, Difference]]:
    """Student → every other system of `marks` → difference.

    A against B is B against A with the sign turned.
    """
    found: dict[str, dict[str, Difference]] = {}
    for student in students:
        found[student] = {
            other: -found[other][student]
            if other in found
            else paired_bootstrap(marks[student], marks[other])
            for other in marks
            if other != student
        }
    return found
