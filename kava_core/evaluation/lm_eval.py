"""Answers scored by the rules of lm-evaluation-harness, for comparison with published numbers.

They are those of its task `gsm8k`, version 3.0: lm_eval/tasks/gsm8k/gsm8k.yaml says what ends a
generation, how an answer is extracted from it and what is passed over in the comparison, the filter
`regex` in lm_eval/filters/extraction.py which match is taken, and `exact_match` in
lm_eval/api/metrics.py how two texts are compared. What is known to be scored wrongly there
("$29.00" is not 29) is scored so here.
"""

from __future__ import annotations

import re

_ENDS = ("Question:", "</s>", "<|im_end|>")
# pattern, which of its matches
_RULES = {
    "strict-match": (re.compile(r"#### (\-?[0-9\.\,]+)"), 0),
    "flexible-extract": (re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"), -1),
}
RULES = tuple(_RULES)
_IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))
_INVALID = "[invalid]"


def extract(text: str, rule: str) -> str:
    """What is taken for the answer in a generated text, "[invalid]" if nothing is.

    rule: one of `RULES`.
    """
    for end in _ENDS:
        text = text.partition(end)[0]
    pattern, which = _RULES[rule]
    found = list(pattern.finditer(text))
    if not found:
        return _INVALID
    return next(group for group in found[which].groups() if group).strip()


def matches(text: str, gold: str, rule: str) -> bool:
    """Whether a generated text has the gold answer by one of `RULES`."""
    return _bare(extract(text, rule)) == _bare(gold)


def _bare(answer: str) -> str:
    for ignored in _IGNORED:
        answer = ignored.sub("", answer)
    return answer.lower()
