"""A row of a source: its fields, and where it stands; and one that is not what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kava_core.errors import KavaError


class BadRow(KavaError):
    """A row that is not what its format says.

    place: where it stands; expected: the same for all rows with this fault; found: instead.
    """

    def __init__(
        self, place: str, expected: str, found: str, remedy: str = "Mend the row."
    ) -> None:
        super().__init__(f"{place}: expected {expected}, found {found}. {remedy}")
        self.place, self.expected, self.found, self.remedy = place, expected, found, remedy

    @property
    def reason(self) -> str:
        """What to count it under."""
        return f"expected {self.expected}"


@dataclass(frozen=True)
class Row:
    """One row: its fields, its place for error messages ("train.jsonl:12"), its number from 0."""

    fields: dict[str, Any]
    place: str
    number: int

    def text(self, name: str) -> str:
        """The field `name`; BadRow if it is missing, not a text, or blank."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong("a text", name)
        return value

    def number_text(self, name: str) -> str:
        """The field `name` as text, "" if it is blank or null; 12.0 is "12", 1e20 all its digits.

        BadRow if it is missing, or neither a text nor a finite number.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or name not in self.fields:
            raise self.wrong("a text or a number", name)
        if value is None or isinstance(value, str):
            return " ".join((value or "").split())
        if not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self.wrong("a text or a number", name)
        return plain_number(value)

    def texts(self, name: str) -> list[str] | str:
        """The field `name`, a text or a list of texts; BadRow if it is anything else."""
        value = self.fields.get(name)
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong("a text or a list of texts", name)
        return value

    def only(self, name: str) -> Row:
        """The row with the only item of the list in field `name` in its place.

        BadRow if it is no list of one item.
        """
        value = self.fields.get(name)
        if not isinstance(value, list) or len(value) != 1:
            raise self.wrong("a list of one item", name)
        return Row({**self.fields, name: value[0]}, self.place, self.number)

    def either(self, *names: str) -> str:
        """The first of the fields `names` that is there; BadRow if none is."""
        for name in names:
            if name in self.fields:
                return name
        raise self.wrong("one of these fields", "` or `".join(names))

    def wrong(self, expected: str, name: str) -> BadRow:
        """The error of a field that is not what it should be."""
        if name in self.fields:
            value = self.fields[name]
            found = f"{type(value).__name__} {value!r:.80}"
        else:
            found = f"no such field beside {', '.join(f'`{key}`' for key in self.fields):.200}"
        return BadRow(self.place, f"{expected} in `{name}`", found)


def plain_number(value: float) -> str:
    """A number in digits, without ".0" if it is whole: 12.0 is "12", 1e-7 is "0.0000001"."""
    if value == int(value):
        return str(int(value))
    return f"{Decimal(repr(value)):f}"
