"""Whether one system answers more problems than another: the paired bootstrap.

Both systems were asked the same N problems, so what is resampled is problems, each with both marks
(Efron and Tibshirani 1993, chapters 13 and 16; Koehn 2004 for the use on test sets). A problem's
difference is +1, 0 or −1, and the mean of N draws with replacement depends only on how many of each
were drawn: those counts are multinomial, and are drawn directly instead of N indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kava_core.errors import KavaError

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Difference:
    """Exact match of one system minus that of another, in points.

    ci95: the 2.5th and 97.5th percentile over the resamples. p_value: two-sided, that of the
    percentile intervals: twice the smaller share of resamples at or beyond no difference, at most 1
    and never below 2 / (RESAMPLES + 1).
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float

    def __neg__(self) -> Difference:
        low, high = self.ci95
        return Difference(0.0 - self.difference, (0.0 - high, 0.0 - low), self.p_value)


def paired_bootstrap(
    left: Sequence[bool], right: Sequence[bool], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Difference:
    """left − right; mark i of both is of the same problem. KavaError if that cannot be."""
    if len(left) != len(right) or not left:
        raise KavaError(
            f"expected two systems' marks on the same problems, found {len(left)} and {len(right)}."
        )
    n = len(left)
    gains = np.asarray(left, dtype=int) - np.asarray(right, dtype=int)
    better, worse = int((gains == 1).sum()), int((gains == -1).sum())
    shares = np.array([better, worse, n - better - worse]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)  # [resamples, 3]
    drawn = counts[:, 0] - counts[:, 1]
    low, high = (100 * float(x) / n for x in np.quantile(drawn, [0.025, 0.975]))
    extreme = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(
        difference=100 * (better - worse) / n,
        ci95=(low, high),
        p_value=min(1.0, 2 * (extreme + 1) / (resamples + 1)),
    )


def compare(
    marks: Mapping[str, Sequence[bool]], students: Sequence[str]
) -> dict[str, dict[str, dict[str, object]]]:
    """{student: {baseline: {difference, ci95, p_value}}} against every other system of `marks`.

    A against B is B against A with the sign turned.
    """
    pairs: dict[tuple[str, str], Difference] = {}
    for student in students:
        for other in marks:
            if other != student:
                turned = pairs.get((other, student))
                pairs[student, other] = (
                    paired_bootstrap(marks[student], marks[other]) if turned is None else -turned
                )
    return {
        student: {
            other: {**asdict(found), "ci95": list(found.ci95)}
            for (name, other), found in pairs.items()
            if name == student
        }
        for student in students
    }
