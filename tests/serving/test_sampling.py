"""Tokens drawn for many rows at once, against one row at a time in float64."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kava_core.serving.sampling import next_tokens


@dataclass
class Row:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)


def likelihoods(scores: Tensor, row: Row) -> list[float]:
    """Of each token of one row, by definition."""
    exponents = [score / row.temperature for score in scores.tolist()]
    largest = max(exponents)
    weights = [math.exp(x - largest) for x in exponents]
    wanted, reached, least = row.top_p * sum(weights), 0.0, 0.0
    if row.top_p < 1:
        for least in sorted(weights, reverse=True):
            reached += least
            if reached >= wanted:
                break
    kept = [weight if weight >= least else 0.0 for weight in weights]
    total = sum(kept)
    return [weight / total for weight in kept]


def drawn(scores: Tensor, row: Row) -> int:
    """The token that the next number of the row's generator falls on."""
    number = float(torch.rand((), dtype=torch.float64, generator=row.generator))
    below = 0.0
    for token, share in enumerate(likelihoods(scores, row)):
        below += share
        if below > number:
            return token
    raise AssertionError(f"{number} is above {below}")


def some_rows() -> list[Row]:
    """Every third takes the likeliest token."""
    return [
        Row((0.0, 0.7, 1.5)[i % 3], (1.0, 0.9, 0.3, 0.99, 1e-6)[i % 5], seed=i) for i in range(30)
    ]


# In the flat one `top_p` takes more tokens than are sorted first; in the coarse one many are alike.
SCORES = {
    "peaked": lambda r: 8 * torch.randn(30, 1001, generator=r),
    "flat": lambda r: 0.1 * torch.randn(30, 9001, generator=r),
    "coarse": lambda r: (4 * torch.randn(30, 1001, generator=r)).round(),
    "tiny": lambda r: torch.randn(30, 3, generator=r),
}


@pytest.mark.parametrize("kind", SCORES)
def test_tokens_are_those_of_the_definition(kind: str) -> None:
    scores = SCORES[kind](torch.Generator().manual_seed(1))
    expected = [
        drawn(x, row) if row.temperature else int(x.argmax())
        for x, row in zip(scores, some_rows(), strict=True)
    ]
    assert next_tokens(scores, some_rows()).tolist() == expected


@pytest.mark.parametrize("kind", SCORES)
def test_company_and_place_change_no_token(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = SCORES[kind](generator)
    together = [next_tokens(scores, rows) for rows in [some_rows()] for _ in range(8)]
    alone = some_rows()
    for chosen in together:
        order = torch.randperm(30, generator=generator).tolist()
        for part in (order[:1], order[1:8], order[8:]):
            found = next_tokens(scores[part], [alone[i] for i in part])
            assert found.tolist() == chosen[part].tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.8)])
def test_tokens_are_as_frequent_as_they_are_likely(temperature: float, top_p: float) -> None:
    scores = torch.tensor([[2.0, -1.0, 0.5, 0.5, 1.9, -30.0, 0.0, 1.0]])
    row = Row(temperature, top_p)
    count = 50_000
    found = Counter(next_tokens(scores.expand(count, -1), [row] * count).tolist())
    for token, share in enumerate(likelihoods(scores[0], row)):
        # Five standard deviations: one in two million.
        assert abs(found[token] - count * share) <= 5 * math.sqrt(count * share * (1 - share))


def test_the_tokens_as_likely_as_the_last_are_all_drawn() -> None:
    row = Row(top_p=0.5)
    found = next_tokens(torch.zeros(100, 5), [row] * 100)
    assert set(found.tolist()) == set(range(5))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_gives_no_token(wrong: float, temperature: float) -> None:
    scores = torch.zeros(2, 7)
    scores[1, 3] = wrong
    with pytest.raises(ArithmeticError, match="scores are no numbers"):
        next_tokens(scores, [Row(), Row(temperature)])
    with pytest.raises(ArithmeticError):
        next_tokens(torch.full((1, 7), -math.inf), [Row(temperature)])


def test_the_largest_vocabularies_have_room() -> None:
    drawn_of_many = next_tokens(torch.zeros(4, 600_000), [Row(seed=i) for i in range(4)])
    assert len({*drawn_of_many.tolist()}) == 4
    assert next_tokens(torch.zeros(1, 300_000), [Row(seed=3)]).tolist()[0] == drawn(
        torch.zeros(300_000), Row(seed=3)
    )
