"""A row of a source: its fields, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kava_core.errors import KavaError


@dataclass(frozen=True)
class Row:
    """One row: its fields, its place for error messages ("train.jsonl:12"), its number from 0."""

    fields: dict[str, Any]
    place: str
    number: int

    def text(self, name: str) -> str:
        """The field `name`; KavaError if it is missing, not a text, or blank."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong("a text", name)
        return value

    def number_text(self, name: str) -> str:
        """The field `name` as text, "" if it is blank or null; 12.0 is "12", 1e20 all its digits.

        KavaError if it is missing, or neither a text nor a finite number.
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
        """The field `name`, a text or a list of texts; KavaError if it is anything else."""
        value = self.fields.get(name)
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong("a text or a list of texts", name)
        return value

    def wrong(self, expected: str, name: str) -> KavaError:
        """The error of a field that is not what it should be."""
        value = self.fields.get(name)
        found = f"{type(value).__name__} {value!r:.80}" if name in self.fields else "no such field"
        return KavaError(
            f"{self.place}: expected {expected} in `{name}`, found {found}. Mend the row."
        )


def plain_number(value: float) -> str:
    """A number in digits, without ".0" if it is whole: 12.0 is "12", 1e-7 is "0.0000001"."""
    if value == int(value):
        return str(int(value))
    return f"{Decimal(repr(value)):f}"
