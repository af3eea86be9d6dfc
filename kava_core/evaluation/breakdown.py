"""Accuracy by what a problem's gold trace is like: operations and length.

Both are read from the trace's text. A problem without steps has neither, and is counted as `none`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from kava_core.findings.scores import GroupScore

NONE = "none"
# An operator stands between two operands; a hyphen in a word and the sign of a number do not.
_NUMBER = r"(?=[-+]?[$€£(\\{]*\.?\d|\\\w|[$(]*[a-zA-Z]\b)"  # or a variable of one letter
_ANY = r"(?=[-+]?[$€£(\\{.]*\w)"
_OPERATIONS = {
    "+": re.compile(rf"(?<=[\w)%}}])\s*\+\s*{_ANY}"),
    "−": re.compile(rf"(?<=[\d)%}}])\s*[-−–]\s*{_NUMBER}|(?<=\w)\s+[-−–]\s+{_NUMBER}"),
    "×": re.compile(
        rf"(?<=[\w)%}}])\s*(?:[*×·⋅]|\\times|\\cdot)\s*{_ANY}|(?<=\d)\s*[xX]\s*(?=[$(]?\d)"
    ),
    "÷": re.compile(rf"(?<=[\d)%}}])\s*/\s*{_NUMBER}|(?<=\w)\s+/\s+{_ANY}|÷|\\div\b|\\[dt]?frac\b"),
}
_BINS = (8, 16, 32, 64, 128, 256, 512)


def operations(steps: Sequence[str]) -> list[str]:
    """Which of + − × ÷ the steps write, in this order; `none` if they write none.

    Only signs count ("48/2", "3 × 4", `\\frac`), not words such as "half of".
    """
    found = [sign for sign, written in _OPERATIONS.items() if any(map(written.search, steps))]
    return found or [NONE]


def length_bin(tokens: int) -> str:
    """The bin of a trace of N_C tokens: `1-8`, `9-16`, …, `257-512`, `513+`; `none` for 0."""
    if not tokens:
        return NONE
    first = 1
    for last in _BINS:
        if tokens <= last:
            return f"{first}-{last}"
        first = last + 1
    return f"{first}+"


def score_groups(labels: Sequence[Sequence[str]], marks: Sequence[bool]) -> dict[str, GroupScore]:
    """Label → score; problem i counts under each of labels[i].

    Operations stand as one writes them, lengths ascend, `none` is last.
    """
    groups: dict[str, list[bool]] = {}
    for names, mark in zip(labels, marks, strict=True):
        for name in names:
            groups.setdefault(name, []).append(mark)
    return {name: GroupScore.of(groups[name]) for name in sorted(groups, key=_place)}


def _place(label: str) -> float:
    if label == NONE:
        return math.inf
    signs = list(_OPERATIONS)
    return signs.index(label) if label in signs else int(re.split(r"\D", label)[0])
