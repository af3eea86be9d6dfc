"""What `kava evict` found: how much was dropped, and how far slots have an identity."""

from __future__ import annotations

import operator
from typing import Annotated

from pydantic import Field

from kava_core.findings.base import Finding
from kava_core.findings.scores import Percent

FILE = "eviction.json"


class Explained(Finding):
    """Share of a variance, from 0 to 1, that a grouping explains; None where nothing varies."""

    keys: float | None
    values: float | None


class EvictionFindings(Finding):
    """eviction.json; rows are the store's, one per layer or per group of layers that share.

    engaged_percent: of (record, row, head), those from which a token was really dropped.
    kept_percent: of all tokens there, those that fill a slot. agreement_percent: of the tokens that
    fill a slot, those that are the most common one of their record's slot over all rows and heads.
    result_percent: of the tokens that fill a slot, those that state a step's result; None where no
    record says which these are. identity_explained: of the targets' variance, by slot and position.
    megabytes: of the store's files. quarantined_records: problems that the teacher's store names
    and lacks (`generate.on_error`), written where there are any.
    """

    engaged_percent: Percent
    kept_percent: Percent
    agreement_percent: Percent
    result_percent: Percent | None
    identity_explained: Explained
    megabytes: float
    quarantined_records: Annotated[int, Field(exclude_if=operator.not_)] = 0

    @property
    def identity(self) -> list[tuple[str, str]]:
        """How far slots have an identity, for people: what of it, and how much."""
        explained = self.identity_explained
        known = self.result_percent is not None
        return [
            ("slots agree", f"on {self.agreement_percent:.1f} % of the kept tokens"),
            (
                "slot and position explain",
                f"{_percent(explained.keys)} of the keys' variance, "
                f"{_percent(explained.values)} of the values'",
            ),
            (
                "results",
                f"{self.result_percent:.1f} % of the kept tokens" if known else "not known",
            ),
        ]


def _percent(share: float | None) -> str:
    return "nothing" if share is None else f"{share:.1%}".replace("%", " %")
