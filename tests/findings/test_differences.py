"""The paired bootstrap against one that draws every problem, and against known cases."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from kava_core.errors import KavaError
from kava_core.findings.differences import (
    RESAMPLES,
    compare,
    holm,
    paired_bootstrap,
    seeded_bootstrap,
)
from kava_core.findings.evaluation import Difference


def marks(both: int, left: int, right: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Marks of two systems of which so many problems were answered by both, by one, by none."""
    pairs = [(True, True)] * both + [(True, False)] * left
    pairs += [(False, True)] * right + [(False, False)] * neither
    random.Random(0).shuffle(pairs)
    return [a for a, _ in pairs], [b for _, b in pairs]


def slow(left: list[bool], right: list[bool], resamples: int, seed: int) -> list[float]:
    """Resampled differences in points, sorted: N problems drawn one by one, both marks kept."""
    rng, n = random.Random(seed), len(left)
    drawn = []
    for _ in range(resamples):
        chosen = [rng.randrange(n) for _ in range(n)]
        drawn.append(100 * (sum(left[i] for i in chosen) - sum(right[i] for i in chosen)) / n)
    return sorted(drawn)


@pytest.mark.parametrize("counts", [(30, 25, 10, 35), (5, 3, 3, 29), (0, 20, 0, 5), (60, 2, 18, 0)])
def test_it_agrees_with_drawing_every_problem(counts: tuple[int, int, int, int]) -> None:
    left, right = marks(*counts)
    found, n, resamples = paired_bootstrap(left, right), len(left), 4000
    drawn = slow(left, right, resamples, seed=1)
    assert found.difference == pytest.approx(100 * (sum(left) - sum(right)) / n)
    # Monte Carlo error of a quantile of two samples, and the differences come in steps of 100 / n.
    for bound, share in zip(found.ci95, (0.025, 0.975), strict=True):
        assert bound == pytest.approx(np.quantile(drawn, share), abs=0.1 * np.std(drawn) + 100 / n)
    beyond = min(sum(d <= 1e-9 for d in drawn), sum(d >= -1e-9 for d in drawn))
    assert found.p_value == pytest.approx(min(1.0, 2 * beyond / resamples), abs=0.03)


@pytest.mark.parametrize("n", [200, 2000])
def test_the_interval_of_many_problems_is_that_of_the_normal(n: int) -> None:
    left, right = marks(n // 2, n // 4, n // 8, n - n // 2 - n // 4 - n // 8)
    found = paired_bootstrap(left, right)
    gains = np.subtract(left, right, dtype=float)
    error = 100 * gains.std() / np.sqrt(n)
    low, high = found.ci95
    assert low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error + 50 / n)
    assert high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error + 50 / n)


def test_equal_marks_are_no_difference_and_opposite_ones_are_all_of_it() -> None:
    same = [True, False] * 20
    assert paired_bootstrap(same, same) == Difference(difference=0.0, ci95=(0.0, 0.0), p_value=1.0)
    found = paired_bootstrap([True] * 40, [False] * 40)
    assert found == Difference(difference=100.0, ci95=(100.0, 100.0), p_value=2 / (RESAMPLES + 1))
    # As many won as lost: nothing to choose between them, however many there are.
    assert paired_bootstrap(*marks(0, 50, 50, 0)).p_value > 0.9


def test_p_and_interval_say_the_same() -> None:
    for gained in range(4, 24):
        found = paired_bootstrap(*marks(40, gained, 8, 60))
        low, high = found.ci95
        if abs(found.p_value - 0.05) > 0.01:
            assert (found.p_value < 0.05) == (low > 0 or high < 0), gained


def test_the_seed_decides_and_pairing_counts() -> None:
    left, right = marks(30, 25, 10, 35)
    assert paired_bootstrap(left, right) == paired_bootstrap(left, right)
    assert paired_bootstrap(left, right) != paired_bootstrap(left, right, seed=1)
    # The same two accuracies, agreeing on fewer problems: a wider interval.
    apart = paired_bootstrap(*marks(10, 45, 30, 15))
    together = paired_bootstrap(left, right)
    assert apart.difference == together.difference
    assert apart.ci95[1] - apart.ci95[0] > together.ci95[1] - together.ci95[0]


def test_every_student_against_every_other_system() -> None:
    left, right = marks(30, 25, 10, 35)
    found = compare(
        {"teacher-cot": [True] * 100, "kava": left, "no-cot": right}, ["kava", "no-cot"]
    )
    assert {student: sorted(others) for student, others in found.items()} == {
        "kava": ["no-cot", "teacher-cot"],
        "no-cot": ["kava", "teacher-cot"],
    }
    one, other = found["kava"]["no-cot"], found["no-cot"]["kava"]
    assert one.difference == 15.0 and other.difference == -15.0
    assert one.ci95 == tuple(-bound for bound in reversed(other.ci95))
    assert one.p_value == other.p_value


@pytest.mark.parametrize(("left", "right"), [([], []), ([True], [True, False])])
def test_marks_of_other_problems_are_refused(left: list[bool], right: list[bool]) -> None:
    with pytest.raises(KavaError, match=f"found {len(left)} and {len(right)}"):
        paired_bootstrap(left, right)


# --- over seeds -----------------------------------------------------------------------------------


def seeds_of(
    *shares: tuple[float, float], n: int = 40
) -> tuple[list[list[bool]], list[list[bool]]]:
    """Marks of two systems, a row for each seed, each answering its share of n problems."""
    draw = random.Random(3)
    rows = [[[draw.random() < share for _ in range(n)] for share in pair] for pair in shares]
    return [left for left, _ in rows], [right for _, right in rows]


def slow_seeds(left: list[list[bool]], right: list[list[bool]], resamples: int) -> list[float]:
    """Seeds drawn one by one, problems drawn one by one, every difference added up."""
    rng, s, n = random.Random(1), len(left), len(left[0])
    drawn = []
    for _ in range(resamples):
        seeds = [rng.randrange(s) for _ in range(s)]
        problems = [rng.randrange(n) for _ in range(n)]
        gained = sum(left[k][i] - right[k][i] for k in seeds for i in problems)
        drawn.append(100 * gained / (s * n))
    return sorted(drawn)


@pytest.mark.parametrize(
    "shares",
    [
        [(0.6, 0.45)],
        [(0.7, 0.6), (0.5, 0.5), (0.6, 0.5)],
        [(0.9, 0.4), (0.4, 0.5), (0.8, 0.4), (0.5, 0.45), (0.7, 0.6)],
    ],
)
def test_over_seeds_it_agrees_with_drawing_each_and_every_problem(
    shares: list[tuple[float, float]],
) -> None:
    left, right = seeds_of(*shares)
    found, resamples = seeded_bootstrap(left, right), 3000
    drawn = slow_seeds(left, right, resamples)
    step = 100 / (len(left) * len(left[0]))
    rights = [100 * sum(map(sum, rows)) / sum(map(len, rows)) for rows in (left, right)]
    assert found.difference == pytest.approx(rights[0] - rights[1])
    for bound, share in zip(found.ci95, (0.025, 0.975), strict=True):
        assert bound == pytest.approx(np.quantile(drawn, share), abs=0.15 * np.std(drawn) + step)
    beyond = min(sum(d <= 1e-9 for d in drawn), sum(d >= -1e-9 for d in drawn))
    assert found.p_value == pytest.approx(min(1.0, 2 * beyond / resamples), abs=0.03)
    assert seeded_bootstrap(left, right) == found


def test_the_p_value_of_a_tiny_case_is_that_of_counting_every_draw() -> None:
    left, right = [[True, True, False], [True, False, True]], [[False, True, False]] * 2
    draws = [
        sum(left[k][i] - right[k][i] for k in seeds for i in problems)
        for seeds in product(range(2), repeat=2)
        for problems in product(range(3), repeat=3)
    ]
    exact = min(1, 2 * min(sum(d <= 0 for d in draws), sum(d >= 0 for d in draws)) / len(draws))
    assert seeded_bootstrap(left, right, resamples=50_000).p_value == pytest.approx(exact, abs=0.02)


def test_seeds_that_differ_widen_the_interval() -> None:
    left, right = [[True] * 20 + [False] * 20] * 4, [[False] * 40] * 4
    apart = [[True] * 40, [False] * 40] * 2
    same, other = seeded_bootstrap(left, right), seeded_bootstrap(apart, right)
    assert same.difference == other.difference == 50
    assert other.ci95[1] - other.ci95[0] > same.ci95[1] - same.ci95[0]


@pytest.mark.parametrize("right", [[[True]], [[True], [True, False]], [[True], [True], [True]]])
def test_marks_of_other_seeds_are_refused(right: list[list[bool]]) -> None:
    with pytest.raises(KavaError, match="with the same seeds"):
        seeded_bootstrap([[True], [False]], right)


def slow_holm(p_values: list[float]) -> list[float]:
    """By its definition: the level at which the step-down procedure first rejects each."""

    def rejected(level: float) -> set[int]:
        found: set[int] = set()
        while left := [i for i in range(len(p_values)) if i not in found]:
            smallest = min(left, key=p_values.__getitem__)
            if p_values[smallest] * len(left) > level + 1e-12:
                break
            found.add(smallest)
        return found

    levels = sorted({min(1.0, p * k) for p in p_values for k in range(1, len(p_values) + 1)})
    return [next((a for a in levels if i in rejected(a)), 1.0) for i in range(len(p_values))]


@pytest.mark.parametrize(
    "p_values", [[], [0.2], [0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.9], [0.02, 0.02, 0.001, 1.0]]
)
def test_holm_is_the_level_at_which_each_is_rejected(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(slow_holm(p_values))


def test_holm_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
