"""The rules of another harness, with what they get wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.evaluation.lm_eval import RULES, extract, matches


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("2+1=<<2+1=3>>3\n#### 3", "3", "3"),
        ("#### 1,080.", "1,080.", "1,080."),
        ("#### -5 and then #### 6", "-5", "6"),
        ("The answer is: 72", "[invalid]", "72"),
        ("an order of $29.00.", "[invalid]", "$29.00."),
        ("72, in total, so", "[invalid]", "72,"),
        ("a range of 5-10", "[invalid]", "-10"),
        ("9", "[invalid]", "9"),
        ("no number", "[invalid]", "[invalid]"),
        ("#### 7\n\nQuestion: Has he 99? #### 99", "7", "7"),
        ("#### 7<|im_end|>8", "7", "7"),
    ],
)
def test_the_published_patterns_take_their_match(text: str, strict: str, flexible: str) -> None:
    assert [extract(text, rule) for rule in RULES] == [strict, flexible]


@pytest.mark.parametrize(
    ("text", "gold", "strict", "flexible"),
    [
        ("#### 1,080.", "1080", True, True),
        ("#### 1080", "She has 1,080.\n#### 1,080", True, True),  # the gold answer as published
        ("The answer is 72.", "72", False, True),
        ("$70,000", "70000", False, True),
        ("$29.00", "29", False, False),  # its issue 3214
        ("it is 72, so by 3", "72", False, False),
        ("", "0", False, False),
    ],
)
def test_the_published_comparison_is_of_text(
    text: str, gold: str, strict: bool, flexible: bool
) -> None:
    assert [matches(text, gold, rule) for rule in RULES] == [strict, flexible]


@given(st.text(alphabet="0123456789.,-$# \nQuestion:", max_size=60))
def test_no_text_breaks_the_rules(text: str) -> None:
    for rule in RULES:
        matches(text, "1", rule)
