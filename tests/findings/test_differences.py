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
    seeded_difference,
)
from kava_core.findings.evaluation import Difference
from kava_core.findings.paired_t import critical_value, paired_t_test, two_sided_p
from kava_core.findings.study import SeededDifference


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


# Fractiles of Student's distribution: Fisher and Yates, Statistical Tables, table III.
TABLE = {
    1: {0.1: 6.314, 0.05: 12.706, 0.01: 63.657},
    2: {0.1: 2.920, 0.05: 4.303, 0.01: 9.925},
    3: {0.1: 2.353, 0.05: 3.182, 0.01: 5.841},
    4: {0.1: 2.132, 0.05: 2.776, 0.01: 4.604},
    9: {0.1: 1.833, 0.05: 2.262, 0.01: 3.250},
    30: {0.1: 1.697, 0.05: 2.042, 0.01: 2.750},
}


@pytest.mark.parametrize(("degrees", "row"), TABLE.items())
def test_the_t_distribution_is_that_of_the_tables(degrees: int, row: dict[float, float]) -> None:
    for level, t in row.items():
        assert two_sided_p(t, degrees) == two_sided_p(-t, degrees) == pytest.approx(level, rel=1e-3)
    assert critical_value(degrees) == pytest.approx(row[0.05], abs=5e-4)
    assert two_sided_p(0.0, degrees) == 1
    assert two_sided_p(1e12, degrees) == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 19])
@pytest.mark.parametrize("t", [0.3, 1.0, 4.303, 40.0])
def test_its_tail_is_that_of_adding_up_the_density(degrees: int, t: float) -> None:
    # The density of t = √degrees · tan(angle) is cos(angle)^(degrees − 1), up to a constant.
    def area(low: float, high: float) -> float:
        width = (high - low) / 200_000
        middles = low + width * (np.arange(200_000) + 0.5)
        return float((np.cos(middles) ** (degrees - 1)).sum() * width)

    tail = area(np.arctan(t / np.sqrt(degrees)), np.pi / 2) / area(0, np.pi / 2)
    assert two_sided_p(t, degrees) == pytest.approx(tail, abs=1e-9)


def test_the_t_test_of_a_textbook_and_of_differences_without_spread() -> None:
    # Student's own example (Biometrika 6, 1908): hours of sleep gained by two drugs.
    gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    p, half = paired_t_test(gains)
    assert p == pytest.approx(0.00283, abs=5e-6)
    assert (1.58 - half, 1.58 + half) == pytest.approx((0.7001, 2.4599), abs=5e-5)
    assert paired_t_test([0.0] * 3) == (1.0, 0.0)
    assert paired_t_test([-0.1] * 3) == (0.0, 0.0)


def test_seeds_that_jump_are_not_significant_and_steady_ones_are() -> None:
    def rows(*right: int) -> list[list[bool]]:
        return [[i < n for i in range(100)] for n in right]

    jumping = seeded_difference(rows(100, 100, 20), rows(10, 11, 11))
    assert jumping.p_bootstrap < 0.001 < jumping.p_value == jumping.p_seeds
    assert jumping.p_value == pytest.approx(0.146, abs=0.002)  # as a t of 2.35 has
    assert jumping.ci95[0] < 0 and jumping.ci95[1] == 100  # a difference is 100 points at the most
    steady = seeded_difference(rows(100, 100, 100), rows(10, 11, 11))
    assert steady.p_seeds is not None and steady.p_seeds < steady.p_bootstrap == steady.p_value
    drawn = seeded_bootstrap(rows(100, 100, 100), rows(10, 11, 11))
    assert (steady.difference, steady.ci95) == (drawn.difference, drawn.ci95)
    one = seeded_difference(rows(60), rows(40))
    assert one.p_seeds is None and one.p_value == one.p_bootstrap
    assert one.ci95 == seeded_bootstrap(rows(60), rows(40)).ci95
    read = SeededDifference.model_validate_json(jumping.model_dump_json())
    assert read == jumping and '"p_value":0.14' in jumping.model_dump_json()


@pytest.mark.parametrize("seeds", [3, 5])
def test_without_a_difference_few_are_significant(seeds: int) -> None:
    draw, trials, n = np.random.default_rng(seeds), 250, 400
    found = []
    for _ in range(trials):
        skill = np.clip(0.5 + 0.1 * draw.standard_normal((2, seeds, 1)), 0, 1)
        left, right = (draw.random((2, seeds, n)) < skill).tolist()
        found.append(seeded_difference(left, right, resamples=200))
    noise = 2.6 * np.sqrt(0.05 * 0.95 / trials)  # as far as 1 in 200 such tests would be above
    assert sum(each.p_value < 0.05 for each in found) / trials <= 0.05 + noise
    assert sum(each.ci95[0] > 0 or each.ci95[1] < 0 for each in found) / trials <= 0.05 + noise
    assert sum(each.p_bootstrap < 0.05 for each in found) / trials > 0.05 + noise  # and alone it is


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
