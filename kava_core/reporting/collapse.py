"""A system that answers one thing, whatever it is asked, in words."""

from __future__ import annotations

from kava_core.findings.scores import COLLAPSED_PERCENT, COLLAPSED_POINTS, CommonestAnswer
from kava_core.wording import shorten

LONGEST_ANSWER = 20  # characters
RULE = (
    f"One answer to {COLLAPSED_PERCENT:g} % of the problems or more, and to "
    f"{COLLAPSED_POINTS:g} points more than have the commonest gold answer, is told: exact match "
    "is then how often that one is right."
)


def collapse_of(commonest: CommonestAnswer | None) -> str:
    """`answers 7 to 99.8 % of the problems`; "" where it answers this and that."""
    if commonest is None or not commonest.collapsed:
        return ""
    answer = shorten(commonest.answer, LONGEST_ANSWER)
    return f"answers {answer} to {commonest.share:.1f} % of the problems"
