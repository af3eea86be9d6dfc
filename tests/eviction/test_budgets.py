"""Budgets per layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.eviction import make_budgets


def test_uniform_gives_every_layer_the_same() -> None:
    assert make_budgets("uniform", 4, 24) == [24, 24, 24, 24]


def test_pyramid_falls_in_a_straight_line_to_a_twentieth() -> None:
    # M = 60, β = 20: from 2·60 − 3 = 117 down to 3 in steps of 38
    assert make_budgets("pyramid", 4, 60) == [117, 79, 41, 3]


def test_beta_says_how_flat_the_pyramid_is() -> None:
    assert make_budgets("pyramid", 3, 10, beta=1) == [10, 10, 10]
    assert make_budgets("pyramid", 3, 10, beta=2) == [15, 10, 5]


@given(
    kind=st.sampled_from(["uniform", "pyramid"]),
    layers=st.integers(1, 80),
    budget=st.integers(1, 300),
    beta=st.floats(1, 100),
)
def test_the_total_is_exact_and_no_layer_goes_without(
    kind: str, layers: int, budget: int, beta: float
) -> None:
    slots = make_budgets(kind, layers, budget, beta)
    assert len(slots) == layers
    assert sum(slots) == layers * budget
    assert min(slots) >= 1
    assert slots == sorted(slots, reverse=True)
    assert all(type(count) is int for count in slots)


@pytest.mark.parametrize("budget", [0, -3, 2.5, True, "8"])
def test_an_impossible_budget_is_named(budget: object) -> None:
    with pytest.raises(KavaError, match="budget"):
        make_budgets("uniform", 4, budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [0.5, 0, -1, float("nan")])
def test_an_impossible_beta_is_named(beta: float) -> None:
    with pytest.raises(KavaError, match="beta"):
        make_budgets("pyramid", 4, 8, beta)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(KavaError, match="uniform, pyramid"):
        make_budgets("cone", 4, 8)
    with pytest.raises(KavaError, match="layer"):
        make_budgets("uniform", 0, 8)
