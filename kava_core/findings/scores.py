"""Shares of right answers, in per cent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field

from kava_core.findings.base import Finding

Z95 = 1.959963984540054

COLLAPSED_PERCENT = 50.0  # problems to which one answer is given, at least, to be called collapsed
COLLAPSED_POINTS = 20.0  # and more than there are of the commonest gold answer

Percent = Annotated[float, Field(ge=0, le=100)]


class GroupScore(Finding):
    """Exact match (%) on the n problems of one kind: a number of steps, an operation, a length."""

    exact_match: Percent
    n: int

    @classmethod
    def of(cls, marks: Sequence[bool]) -> Self:
        """marks: of each problem, at least one."""
        return cls(exact_match=100 * sum(marks) / len(marks), n=len(marks))


class CommonestAnswer(Finding):
    """What a system answers most often, the first given of several.

    share: of the problems, in %, to which it answers just this; gold: of those whose gold answer is
    the commonest among the gold answers.
    """

    answer: str
    share: Percent
    gold: Percent

    @classmethod
    def of(cls, answers: Sequence[str], gold: Sequence[str]) -> Self | None:
        """answers: to each problem, "" where none could be read; None where there are none."""
        given = Counter(answer for answer in answers if answer)
        if not given:
            return None
        ((answer, times),) = given.most_common(1)
        ((_, most),) = Counter(gold).most_common(1)
        return cls(answer=answer, share=100 * times / len(answers), gold=100 * most / len(gold))

    @property
    def collapsed(self) -> bool:
        """Whether the system answers one thing, whatever it is asked."""
        return self.share >= COLLAPSED_PERCENT and self.share - self.gold >= COLLAPSED_POINTS


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
