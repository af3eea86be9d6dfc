"""What becomes of records that cannot be used: an error that names them all, or a count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from kava_core.errors import KavaError
from kava_core.problems.rows import BadRow

OnBadRecord = Literal["fail", "drop"]
_NAMED = 5  # places of each reason


class BadRecords(KavaError):
    """All that is wrong with what was read: counts, reasons, and where.

    bad: split or test set → its bad rows; rows: the same → how many it has in all.
    """

    def __init__(self, bad: Mapping[str, Sequence[BadRow]], rows: Mapping[str, int]) -> None:
        self.bad = {name: list(found) for name, found in bad.items() if found}
        self.rows = {name: rows[name] for name in self.bad}
        together = [row for found in self.bad.values() for row in found]
        if len(together) == 1:
            super().__init__(f"{together[0]} Or leave it out: `prepare.on_bad_record: drop`.")
            return
        counts = ", ".join(
            f"{len(found)} of {self.rows[name]} of {name}" for name, found in self.bad.items()
        )
        super().__init__(
            f"Records that cannot be used: {counts}. {tell(together)}. The first: {together[0]} "
            "Or leave all of them out: `prepare.on_bad_record: drop`."
        )


def tell(bad: Sequence[BadRow]) -> str:
    """Bad rows by reason, with their number and the first places."""
    places: dict[str, list[str]] = {}
    for row in bad:
        places.setdefault(row.reason, []).append(row.place)
    return "; ".join(
        f"{len(found)} {reason} ({', '.join(found[:_NAMED])}"
        + (f" and {len(found) - _NAMED} more)" if len(found) > _NAMED else ")")
        for reason, found in places.items()
    )
