"""Whether one system answers more problems than another: the paired bootstrap, and over seeds a
t-test beside it.

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
from kava_core.findings.paired_t import paired_t_test
from kava_core.findings.study import SeededDifference

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


def seeded_bootstrap(
    left: Sequence[Sequence[bool]],
    right: Sequence[Sequence[bool]],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Difference:
    """left − right, each trained with S seeds: [S, N], row s of both of the same seed.

    Seeds and problems are both drawn with replacement, independently of each other; one draw of
    problems is asked of all seeds that were drawn. With one seed it says nothing about others.
    KavaError if the marks are not of the same seeds and problems.
    """
    shapes = [[len(row) for row in rows] for rows in (left, right)]
    if shapes[0] != shapes[1] or len(set(shapes[0])) != 1 or not shapes[0][0]:
        raise KavaError(
            f"expected two systems' marks on the same problems with the same seeds, found "
            f"{shapes[0]} and {shapes[1]} problems per seed."
        )
    gains = np.asarray(left, dtype=int) - np.asarray(right, dtype=int)  # [S, N]
    seeds, n = gains.shape
    # Problems on which all seeds differ alike are as good as one another: their counts are drawn.
    kinds, counts = np.unique(gains, axis=1, return_counts=True)  # [S, K], [K]
    rng = np.random.default_rng(seed)
    problems = rng.multinomial(n, counts / n, size=resamples) @ kinds.T  # [resamples, S]
    drawn = (problems * rng.multinomial(seeds, [1 / seeds] * seeds, size=resamples)).sum(1)
    low, high = (100 * float(x) / (n * seeds) for x in np.quantile(drawn, [0.025, 0.975]))
    extreme = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(
        difference=100 * float(gains.sum()) / (n * seeds),
        ci95=(low, high),
        p_value=min(1.0, 2 * (extreme + 1) / (resamples + 1)),
    )


def seeded_difference(
    left: Sequence[Sequence[bool]],
    right: Sequence[Sequence[bool]],
    *,
    resamples: int = RESAMPLES,
) -> SeededDifference:
    """left − right, as `seeded_bootstrap` takes them, held against two kinds of chance.

    The bootstrap over few seeds is anticonservative: what it draws from them varies less than seeds
    do, and of three that agree in sign every draw agrees. A paired t-test over the seeds'
    differences knows how few they are, but not that the problems are drawn too. So the larger
    p-value of both counts, and the interval reaches as far as either's does.
    """
    drawn = seeded_bootstrap(left, right, resamples=resamples)
    (low, high), p_seeds = drawn.ci95, None
    if len(left) > 1:
        gains = [
            100 * (sum(mine) - sum(other)) / len(mine)
            for mine, other in zip(left, right, strict=True)
        ]
        p_seeds, half = paired_t_test(gains)
        low = max(-100.0, min(low, drawn.difference - half))
        high = min(100.0, max(high, drawn.difference + half))
    return SeededDifference(
        difference=drawn.difference,
        ci95=(low, high),
        p_bootstrap=drawn.p_value,
        p_seeds=p_seeds,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected so that the chance of any false finding among all of them is held (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


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
