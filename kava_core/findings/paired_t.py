"""Student's t-test of paired differences, of a few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.05
LARGEST_CRITICAL = 13.0  # 12.71 with one degree of freedom, less with more


def paired_t_test(differences: Sequence[float]) -> tuple[float, float]:
    """Two-sided p-value of a mean of 0, and half the width of the mean's 95 % interval.

    differences: at least two. Where all are equal, p is 1 if they are 0 and else 0.
    """
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    degrees = len(differences) - 1
    p = two_sided_p(mean / error, degrees) if error else float(mean == 0)
    return p, critical_value(degrees) * error


def two_sided_p(t: float, degrees: int) -> float:
    """The chance of a t at least as far from 0, by whole degrees of freedom.

    The regularised incomplete beta function is a finite sum there (Abramowitz and Stegun 1964,
    26.7.3 and 26.7.4), right to 15 digits behind the point.
    """
    angle = math.atan2(abs(t), math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = cosine**odd, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return max(0.0, 1 - inside)


def critical_value(degrees: int) -> float:
    """The t beyond which, on either side, lie 5 %: by halving."""
    low, high = 0.0, LARGEST_CRITICAL
    for _ in range(60):
        middle = (low + high) / 2
        if two_sided_p(middle, degrees) > LEVEL:
            low = middle
        else:
            high = middle
    return high
