"""Shares of right answers, in per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field

from kava_core.findings.base import Finding

Z95 = 1.959963984540054

Percent = Annotated[float, Field(ge=0, le=100)]


class GroupScore(Finding):
    """Exact match (%) on the n problems of one kind: a number of steps, an operation, a length."""

    exact_match: Percent
    n: int

    @classmethod
    def of(cls, marks: Sequence[bool]) -> Self:
        """marks: of each problem, at least one."""
        return cls(exact_match=100 * sum(marks) / len(marks), n=len(marks))


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, in per cent (Wilson 1927)."""
    p = correct / n
    centre = p + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return 100 * max(0.0, (centre - spread) / scale), 100 * min(1.0, (centre + spread) / scale)


def score_steps(steps: Sequence[int], marks: Sequence[bool]) -> dict[int, GroupScore]:
    """Number of steps → score, ascending; mark i is of a problem with steps[i] steps."""
    groups: dict[int, list[bool]] = {}
    for number, mark in zip(steps, marks, strict=True):
        groups.setdefault(number, []).append(mark)
    return {number: GroupScore.of(groups[number]) for number in sorted(groups)}
