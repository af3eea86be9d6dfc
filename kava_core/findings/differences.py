"""Whether one system answers more problems than another: the paired bootstrap.

Both systems were asked the same N problems, so what is resampled is problems, each with both marks
(Efron and Tibshirani 1993, chapters 13 and 16; Koehn 2004 for the use on test sets). A problem's
difference is +1, 0 or −1, and the mean of N draws with replacement depends only on how many of each
were drawn: those counts are multinomial, and are drawn directly instead of N indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kava_core.errors import KavaError
from kava_core.findings.evaluation import Difference

RESAMPLES = 10_000
SEED = 0


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
) -> dict[str, dict[str, Difference]]:
    """Student → every other system of `marks` → difference.

    A against B is B against A with the sign turned.
    """
    found: dict[str, dict[str, Difference]] = {}
    for student in students:
        found[student] = {
            other: -found[other][student]
            if other in found
            else paired_bootstrap(marks[student], marks[other])
            for other in marks
            if other != student
        }
    return found
