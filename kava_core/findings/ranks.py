"""Whether two numbers order the same things alike: Spearman's rank correlation (Spearman 1904)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kava_core.findings.study import RankCorrelation

PERMUTATIONS = 10_000
SEED = 0


def spearman(left: Sequence[float], right: Sequence[float]) -> RankCorrelation | None:
    """Of N things with a number on the left and one on the right; equal numbers share their mean
    rank. None where one side does not order them at all.

    The p-value is two-sided: how often an order drawn at random agrees as much, or disagrees.
    """
    ranks = [_centred_ranks(side) for side in (left, right)]
    norm = float(np.sqrt(np.prod([np.square(rank).sum() for rank in ranks])))
    if not norm:
        return None
    rho = float(ranks[0] @ ranks[1]) / norm
    draw = np.random.default_rng(SEED)
    drawn = np.array([draw.permutation(ranks[0]) for _ in range(PERMUTATIONS)]) @ ranks[1] / norm
    as_far = int((np.abs(drawn) >= abs(rho) - 1e-12).sum())
    return RankCorrelation(rho=min(1.0, max(-1.0, rho)), p_value=(as_far + 1) / (PERMUTATIONS + 1))


def _centred_ranks(numbers: Sequence[float]) -> np.ndarray:
    """[N], with mean 0."""
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return np.asarray(ranks - ranks.mean())
