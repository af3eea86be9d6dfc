"""A row's fields: texts, and numbers as texts."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.problems.rows import Row, plain_number


@given(st.one_of(st.integers(-(10**18), 10**18), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_is_written_in_digits_and_keeps_its_value(number: Any) -> None:
    text = plain_number(number)
    assert set(text) <= set("-0123456789.")
    whole = number == int(number)  # then exactly the float, otherwise its shortest name
    assert Fraction(text) == Fraction(number if whole else str(number))


def test_numbers_of_rows_are_texts() -> None:
    def written(value: Any) -> str:
        return Row({"answer": value}, "train.jsonl:1", 0).number_text("answer")

    cases = [(12.0, "12"), (-3, "-3"), (0.5, "0.5"), (1e21, "1" + "0" * 21), (None, ""), (" ", "")]
    assert [written(value) for value, _ in cases] == [text for _, text in cases]
    for value in (True, float("nan"), float("inf"), [1], {}):
        with pytest.raises(KavaError, match=r"train.jsonl:1: expected a text or a number"):
            written(value)


def test_a_row_of_many_fields_is_not_echoed_whole() -> None:
    row = Row({f"field-{i}": 1 for i in range(100_000)}, "train.jsonl:1", 0)
    with pytest.raises(KavaError, match="no such field beside `field-0`, `field-1`") as raised:
        row.text("question")
    assert len(str(raised.value)) < 400
